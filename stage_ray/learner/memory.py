"""Bytes that one rank of the learner needs, as a function of counts; tests hold it against real updates."""

from __future__ import annotations

from stage_ray.config.model_sizes import BFLOAT16, FLOAT32, WIDTH, ModelSizes

LOGITS_AT_ONCE = 2**22  # that of `stage_ray.policies.base`, which imports torch; a test compares them


def learner_memory(
    model: ModelSizes, *, ranks: int, images: int, prompt: int, dtype: str, checkpointing: bool
) -> dict[str, int]:
    """Bytes by what they hold: FSDP2 shards in float32, two layers and the root gathered at a time.

    Frozen parts (image head, vision tower, tokenizer) are whole on every rank, for policy and reference each.

    Args:
        images: of one micro-batch.
        prompt: tokens before the image's.
        dtype: what the layers compute in; ``bfloat16`` is autocast on one rank, FSDP2's mixed precision on more.
        checkpointing: of the layers' activations.
    """
    sharded = ranks > 1
    batch = (model, images, prompt, dtype, sharded, checkpointing)
    shard = -(-model.trained // ranks) * FLOAT32
    copies = WIDTH[dtype] * (2 * model.layer + model.embedding)
    reduced = (WIDTH[dtype] + FLOAT32) * max(model.layer, model.embedding)  # a gradient before and while it is summed
    casts = BFLOAT16 * model.layers * model.layer if dtype == "bfloat16" else 0  # autocast keeps what it cast
    return {
        "weights": shard,
        "reference": shard,
        "gradients": shard,
        "optimizer": 2 * shard,
        "frozen parts": 2 * model.frozen * FLOAT32,
        "gathered shards": copies + reduced if sharded else casts,
        "activations": kept_bytes(*batch),
        "backward, logits": working_bytes(*batch),
    }


def layer_activations(model: ModelSizes, *, dtype: str, sharded: bool) -> int:
    """Bytes that one layer keeps for its backward pass, a token; attention by a fused kernel, so no L x L scores.

    Counted in transformers' Llama: each norm keeps its input in float32 and the normed states; each matrix its input;
    attention q, k, v and the log-sum of each head; the MLP gate, silu(gate), up and their product. Under plain autocast
    norms work in float32, and every matrix makes a bfloat16 copy of its input for itself; under FSDP2 the states are
    bfloat16 as the parameters are.
    """
    hidden, queries = model.hidden, model.heads * model.head_dim
    attention_mlp = queries + 2 * model.kv_heads * model.head_dim + 4 * model.intermediate
    small = FLOAT32 * (2 + model.heads)
    if dtype == "float32":
        return FLOAT32 * (6 * hidden + queries + attention_mlp) + small
    if sharded:
        return FLOAT32 * 2 * hidden + BFLOAT16 * (4 * hidden + queries + attention_mlp) + small
    return FLOAT32 * 4 * hidden + BFLOAT16 * (5 * hidden + queries + attention_mlp) + small


def kept_bytes(model: ModelSizes, images: int, prompt: int, dtype: str, sharded: bool, checkpointing: bool) -> int:
    """What a micro-batch keeps from its forward to its backward pass.

    Every layer's activations, or with checkpointing its input alone; embeddings and last norm; and of the chunked head
    one slope a state beside the state.
    """
    stream = BFLOAT16 if dtype == "bfloat16" and sharded else FLOAT32
    layer = stream * model.hidden if checkpointing else layer_activations(model, dtype=dtype, sharded=sharded)
    ends = 3 * FLOAT32 * model.hidden
    slopes = images * model.image_tokens * 2 * FLOAT32 * model.hidden
    return images * (prompt + model.image_tokens - 1) * (model.layers * layer + ends) + slopes


def working_bytes(model: ModelSizes, images: int, prompt: int, dtype: str, sharded: bool, checkpointing: bool) -> int:
    """The larger of two that never meet: a chunk of the head's logits, and the backward pass of one layer.

    A chunk has five times its logits: log-softmax, softmax, slope and gradient beside them. A layer's backward holds
    gradients of the MLP's three wide states and of two narrow ones; with checkpointing, its activations once more.
    """
    layer = WIDTH[dtype] * 3 * model.intermediate + 2 * FLOAT32 * model.hidden
    if checkpointing:
        layer += layer_activations(model, dtype=dtype, sharded=sharded)
    return max(5 * LOGITS_AT_ONCE * FLOAT32, images * (prompt + model.image_tokens - 1) * layer)


def loading_bytes(model: ModelSizes) -> int:
    """While a rank starts: policy and reference whole in float32, before they are cut."""
    return 2 * model.total * FLOAT32
