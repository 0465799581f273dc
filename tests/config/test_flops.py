"""Model FLOPs: the formulas against what torch counts in a real model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from stage_ray.config import PolicyConfig
from stage_ray.config.flops import forward_flops, sampling_flops, training_flops
from stage_ray.config.model_sizes import KNOWN, ModelSizes
from stage_ray.policies import load_policy
from stage_ray.policies.base import Policy

PROMPT = tuple(range(9, 20))
BIASES = 2e-3  # the formulas count the head's, which multiply nothing


@pytest.fixture(scope="module")
def policy(model) -> Policy:
    return load_policy(PolicyConfig(path=str(model)), device=torch.device("cpu"))


@pytest.fixture
def sizes(policy) -> ModelSizes:
    found = policy.codec.sizes()
    assert found is not None
    return found


def counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # its fused kernel is not counted
        work()
    return counter.get_total_flops()


def test_a_forward_and_a_training_pass_are_what_torch_counts(policy, sizes):
    tokens = torch.arange(policy.image_tokens).unsqueeze(0)
    embedding = counted(lambda: policy.embed_image_tokens(tokens[:, :-1]))  # frozen, and no part of the formula
    with torch.no_grad():
        forward = counted(lambda: policy.image_logits([PROMPT], tokens))
    both = counted(lambda: policy.image_logits([PROMPT], tokens).sum().backward())
    policy.model.zero_grad()
    assert forward_flops(sizes, len(PROMPT)) == pytest.approx(forward - embedding, rel=BIASES)
    assert training_flops(sizes, len(PROMPT)) == pytest.approx(both - embedding, rel=BIASES)


@torch.no_grad()
def test_a_sequence_that_is_drawn_with_a_cache_is_what_torch_counts(policy, sizes):
    llama, cache = policy.model.model.language_model, DynamicCache()

    def draw() -> None:
        embeds = llama.embed_tokens(torch.tensor([PROMPT]))
        for _ in range(policy.image_tokens):
            state = llama(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            policy.head(state)
            embeds = state[:, None]  # stands for the next token's

    assert sampling_flops(sizes, len(PROMPT)) == pytest.approx(counted(draw), rel=BIASES)


def test_of_a_large_model_the_parameters_that_multiply_tokens_are_most_of_it():
    model = KNOWN["janus-pro-7b"]
    tokens, used = 64 + model.image_tokens - 1, model.layers * model.layer + model.head
    assert training_flops(model, 64) == pytest.approx(6 * used * tokens, rel=0.05)
    assert sampling_flops(model, 64) == pytest.approx(2 * used * tokens, rel=0.05)
