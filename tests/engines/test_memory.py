"""The memory of a rollout worker: the formulas against what real tensors and vLLM's blocks take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from stage_ray.commands.plan import GPUS, room
from stage_ray.config.model_sizes import KNOWN
from stage_ray.engines import memory
from stage_ray.policies import image_tokenizer
from stage_ray.policies.static_decoder import StaticDecoder


@pytest.mark.parametrize("heads", [(2, 1), (4, 4)])
def test_the_cache_is_as_large_as_the_torch_engine_makes_it(heads):
    sizes = KNOWN["janus-pro-1b"]
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=8,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=heads[0],
            num_key_value_heads=heads[1],
        )
    )
    small = replace(sizes, layers=3, hidden=64, heads=heads[0], kv_heads=heads[1], head_dim=64 // heads[0])
    length = 2 * memory.CACHE_BLOCK
    cache = StaticDecoder(llama, 2, length)._new_cache(2, length)
    assert cache.numel() * cache.element_size() == 2 * memory.cache_bytes(small, tokens=length, dtype="float32")


def test_the_cache_is_vllms_blocks_times_its_page():
    interface = pytest.importorskip("vllm.v1.kv_cache_interface")
    model = KNOWN["janus-pro-7b"]
    page = interface.FullAttentionSpec(
        block_size=memory.CACHE_BLOCK, num_kv_heads=model.kv_heads, head_size=model.head_dim, dtype=torch.bfloat16
    ).page_size_bytes
    blocks = -(-(memory.LONGEST_PROMPT + model.image_tokens) // memory.CACHE_BLOCK)
    tokens = memory.LONGEST_PROMPT + model.image_tokens
    assert memory.cache_bytes(model, tokens=tokens, dtype="bfloat16") == blocks * page * model.layers


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("model", KNOWN)
def test_the_images_in_flight_fit_and_one_more_would_not(model, gpu):
    sizes, space = KNOWN[model], room(GPUS[gpu])
    images = memory.images_in_flight(sizes, space, dtype="bfloat16")
    used = [sum(memory.rollout_memory(sizes, images=n, dtype="bfloat16").values()) for n in (images, images + 1)]
    assert images == 0 or used[0] <= space
    assert used[1] > space or images == 1024  # the most that are looked for


def test_pictures_are_decoded_in_chunks_of_the_codecs_size():
    assert memory.DECODE_CHUNK == image_tokenizer.DECODE_CHUNK
