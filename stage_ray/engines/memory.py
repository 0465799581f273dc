"""Bytes that a vLLM rollout worker needs on its GPU, as a function of counts; tests hold it against real tensors."""

from __future__ import annotations

from stage_ray.config import RolloutConfig
from stage_ray.config.model_sizes import BFLOAT16, FLOAT32, WIDTH, ModelSizes

# Tokens; the memory of a batch is reserved for prompts of this length.
LONGEST_PROMPT = RolloutConfig().max_prompt_tokens
CACHE_BLOCK = 16  # tokens; vLLM's default on GPUs
CPU_CACHE_BLOCK = 16  # and on CPUs, for the kernel that is the fastest with one query a row
CUDA_GRAPHS = int(1.5 * 2**30)  # reserved for vLLM's captured decode steps
DECODER_MAPS = 4  # full-size feature maps alive at once: input, normed, convolved, shortcut
DECODE_CHUNK = 16  # that of `stage_ray.policies.image_tokenizer`, which imports torch; a test compares them


def cache_bytes(model: ModelSizes, *, tokens: int, dtype: str) -> int:
    """Key-value cache of one sequence in vLLM's whole blocks: two tensors a layer [kv heads, tokens, head dim]."""
    token = 2 * model.layers * model.kv_heads * model.head_dim * WIDTH[dtype]
    return -(-tokens // CACHE_BLOCK) * CACHE_BLOCK * token  # whole blocks, rounded up


def longest_prompt(model: ModelSizes) -> int:
    """Tokens of the longest prompt: the model's own bound where it is below the config's default."""
    return min(LONGEST_PROMPT, model.prompt_tokens or LONGEST_PROMPT)


def rollout_memory(model: ModelSizes, *, images: int, dtype: str) -> dict[str, int]:
    """Bytes by what they hold, with ``images`` in flight, each a conditional and an unconditional sequence.

    As in the engine, the cache holds a whole batch, and vLLM tries out a prefill of every prompt at once (states and
    residual, MLP's gate, up and product).
    """
    size, sequences, prompt = WIDTH[dtype], 2 * images, longest_prompt(model)
    prefill = sequences * prompt * size * (4 * model.hidden + 3 * model.intermediate)
    logits = 5 * sequences * model.codes * FLOAT32  # both branches, guided, their softmax and noise
    maps = (
        min(images, model.decoded_at_once or DECODE_CHUNK)
        * DECODER_MAPS
        * model.base_channels
        * model.side_pixels**2
        * FLOAT32
    )
    text = BFLOAT16 * model.text_encoder + sequences * prompt * model.text_features * size
    return {
        "weights": (model.trained + model.image_embedding) * size + model.head * FLOAT32,
        "KV cache": sequences * cache_bytes(model, tokens=prompt + model.image_positions, dtype=dtype),
        "prefill, logits": max(prefill, logits),
        "CUDA graphs": CUDA_GRAPHS,
        "image decoder": model.vqmodel * FLOAT32 + maps,
        **({"text encoder": text} if text else {}),
    }


def images_in_flight(model: ModelSizes, space: int, *, dtype: str, most: int = 1024) -> int:
    """The most images of a batch that fit ``space`` bytes, up to ``most``; 0 where not even the weights do."""
    counts = range(most, 0, -1)  # from above, so that the first that fits is the most
    return next((n for n in counts if sum(rollout_memory(model, images=n, dtype=dtype).values()) <= space), 0)
