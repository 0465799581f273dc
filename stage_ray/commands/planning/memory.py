"""Bytes on one GPU, by role: pure functions; each line says where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stage_ray.commands.planning.gpus import GIB, Gpu
from stage_ray.commands.planning.models import ModelSizes

FLOAT32, BFLOAT16 = 4, 2
# Those of stage_ray.engines.vllm.engine and stage_ray.policies, which import torch; a test holds them equal.
LONGEST_PROMPT, LOGITS_AT_ONCE, DECODE_CHUNK = 256, 2**22, 16
CACHE_BLOCK = 16  # tokens; vLLM's default on GPUs
CONTEXT = int(1.5 * GIB)  # CUDA context, NCCL's buffers, cuBLAS workspaces
FRAGMENTS = 0.04  # of a card that torch's allocator cannot hand out
CUDA_GRAPHS = int(1.5 * GIB)  # what vLLM's captured decode steps keep
DECODER_MAPS = 4  # full-size feature maps alive at once: input, normed, convolved, shortcut
REWARD_PARAMETERS = 0.5e9  # Mask2Former Swin-S (69 M, arXiv 2112.01527) and CLIP ViT-L/14 (428 M, arXiv 2103.00020)
REWARD_ACTIVATIONS = 3 * GIB

Lines = dict[str, int]
"""What it is -> bytes."""


def width(dtype: str) -> int:
    """Bytes of a number.

    Example:
        >>> width("bfloat16")
        2
    """
    return {"float32": FLOAT32, "bfloat16": BFLOAT16}[dtype]


def room(gpu: Gpu) -> int:
    """Bytes of a GPU that a plan may fill."""
    return int(gpu.memory_bytes * (1 - FRAGMENTS)) - CONTEXT


def cache_bytes(model: ModelSizes, *, tokens: int, dtype: str) -> int:
    """Key-value cache of one sequence in vLLM's whole blocks: two tensors a layer [kv heads, tokens, head dim].

    Example:
        >>> from stage_ray.commands.planning.models import KNOWN
        >>> cache_bytes(KNOWN["janus-pro-7b"], tokens=832, dtype="bfloat16") // 2**20
        390
    """
    blocks = -(-tokens // CACHE_BLOCK)
    return blocks * CACHE_BLOCK * model.cache * width(dtype)


def rollout_lines(model: ModelSizes, *, images: int, dtype: str) -> Lines:
    """A vLLM engine with ``images`` in flight, each a conditional and an unconditional sequence.

    Memory is kept for prompts of `LONGEST_PROMPT` tokens, as the engine itself does: the cache holds a whole wave, and
    vLLM tries out a prefill of every prompt at once (states and residual, MLP's gate, up and product).
    """
    size, rows = width(dtype), 2 * images
    prefill = rows * LONGEST_PROMPT * size * (4 * model.hidden + 3 * model.intermediate)
    logits = 5 * rows * model.codes * FLOAT32  # both branches, guided, their softmax and noise
    maps = min(images, DECODE_CHUNK) * DECODER_MAPS * model.base_channels * model.side_pixels**2 * FLOAT32
    return {
        "weights": (model.trained + model.image_embedding) * size + model.head * FLOAT32,
        "KV cache": rows * cache_bytes(model, tokens=LONGEST_PROMPT + model.image_tokens, dtype=dtype),
        "prefill, logits": max(prefill, logits),
        "CUDA graphs": CUDA_GRAPHS,
        "image decoder": model.vqmodel * FLOAT32 + maps,
    }


def vllm_share(lines: Mapping[str, int], gpu: Gpu) -> float:
    """``rollout.gpu_memory_utilization``: all but the image decoder, which lives beside vLLM, rounded up to 1 %."""
    inside = sum(size for name, size in lines.items() if name != "image decoder") + CONTEXT
    return -(-100 * inside // gpu.memory_bytes) / 100


def images_in_flight(model: ModelSizes, gpu: Gpu, *, dtype: str, most: int = 1024) -> int:
    """The most images of a wave that fit one GPU; 0 where not even the weights do."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if sum(rollout_lines(model, images=middle, dtype=dtype).values()) <= room(gpu):
            low = middle
        else:
            high = middle - 1
    return low


def layer_activations(model: ModelSizes, *, dtype: str, sharded: bool) -> int:
    """Bytes that one layer keeps for its backward pass, a token; attention by a fused kernel, so no L x L scores.

    Counted in transformers' Llama: each norm keeps its input in float32 and the normed states; each matrix its input;
    attention q, k, v and the log-sum of each head; the MLP gate, silu(gate), up and their product. Under plain autocast
    norms work in float32, and every matrix makes a bfloat16 copy of its input for itself; under FSDP2 the states are
    bfloat16 as the parameters are.
    """
    hidden, keys, middle = model.hidden, model.kv_heads * model.head_dim, model.intermediate
    queries = model.heads * model.head_dim
    attention_mlp = queries + 2 * keys + 4 * middle
    small = FLOAT32 * (2 + model.heads)
    if dtype == "float32":
        return FLOAT32 * (6 * hidden + queries + attention_mlp) + small
    if sharded:
        return FLOAT32 * 2 * hidden + BFLOAT16 * (4 * hidden + queries + attention_mlp) + small
    return FLOAT32 * 4 * hidden + BFLOAT16 * (5 * hidden + queries + attention_mlp) + small


def kept_bytes(model: ModelSizes, *, rows: int, prompt: int, dtype: str, sharded: bool, checkpointing: bool) -> int:
    """What one micro-batch keeps from its forward to its backward pass.

    Every layer's activations, or with checkpointing its input alone; embeddings and last norm; and of the chunked head
    one slope a state beside the state.
    """
    stream = BFLOAT16 if dtype == "bfloat16" and sharded else FLOAT32
    layer = stream * model.hidden if checkpointing else layer_activations(model, dtype=dtype, sharded=sharded)
    ends = 3 * FLOAT32 * model.hidden
    slopes = rows * model.image_tokens * 2 * FLOAT32 * model.hidden
    return rows * (prompt + model.image_tokens - 1) * (model.layers * layer + ends) + slopes


def working_bytes(model: ModelSizes, *, rows: int, prompt: int, dtype: str, sharded: bool, checkpointing: bool) -> int:
    """The larger of two that never meet: a chunk of the head's logits, and the backward pass of one layer.

    A chunk has five times its logits: log-softmax, softmax, slope and gradient beside them. A layer's backward holds
    gradients of the MLP's three wide states and of two narrow ones; with checkpointing, its activations once more.
    """
    layer = width(dtype) * 3 * model.intermediate + 2 * FLOAT32 * model.hidden
    if checkpointing:
        layer += layer_activations(model, dtype=dtype, sharded=sharded)
    return max(5 * LOGITS_AT_ONCE * FLOAT32, rows * (prompt + model.image_tokens - 1) * layer)


def learner_lines(
    model: ModelSizes, *, ranks: int, rows: int, dtype: str, checkpointing: bool, prompt: int = LONGEST_PROMPT
) -> Lines:
    """One rank of the learner: FSDP2 shards in float32, two layers and the root gathered at a time.

    Frozen parts (image head, vision tower, tokenizer) are whole on every rank, for policy and reference each.
    """
    sharded = ranks > 1
    batch: Any = {"rows": rows, "prompt": prompt, "dtype": dtype, "sharded": sharded, "checkpointing": checkpointing}
    shard = -(-model.trained // ranks) * FLOAT32
    copies = width(dtype) * (2 * model.layer + model.embedding)
    reduced = (width(dtype) + FLOAT32) * max(model.layer, model.embedding)  # a gradient before and while it is summed
    casts = BFLOAT16 * model.layers * model.layer if dtype == "bfloat16" else 0  # autocast keeps what it cast
    return {
        "weights": shard,
        "reference": shard,
        "gradients": shard,
        "optimizer": 2 * shard,
        "frozen parts": 2 * model.frozen * FLOAT32,
        "gathered shards": copies + reduced if sharded else casts,
        "activations": kept_bytes(model, **batch),
        "backward, logits": working_bytes(model, **batch),
    }


def learner_loading(model: ModelSizes) -> int:
    """While a rank starts: policy and reference whole in float32, before they are cut."""
    return 2 * model.total * FLOAT32


def reward_lines() -> Lines:
    """A worker with GenEval's detector and CLIP in float32, and a batch of pictures on its way through."""
    return {"scorers": int(REWARD_PARAMETERS) * FLOAT32, "activations": REWARD_ACTIVATIONS}


def group_bytes(model: ModelSizes, group_size: int) -> int:
    """A `RolloutGroup` without pictures: token ids int32 and three float32 arrays [G, T]; without the prompt's text."""
    return group_size * model.image_tokens * (4 + 3 * FLOAT32)


def weight_bytes(model: ModelSizes) -> int:
    """One published version: the trained parameters in float32."""
    return model.trained * FLOAT32
