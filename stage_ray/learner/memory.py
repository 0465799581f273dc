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
    kept, working = batch_bytes(
        model, images=images, prompt=prompt, dtype=dtype, sharded=sharded, checkpointing=checkpointing
    )
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
        "activations": kept,
        "backward, logits": working,
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


def batch_bytes(
    model: ModelSizes, *, images: int, prompt: int, dtype: str, sharded: bool, checkpointing: bool
) -> tuple[int, int]:
    """What a micro-batch keeps from its forward to its backward pass, and what it works in beside that.

    Kept are every layer's activations, or with checkpointing its input alone; embeddings and last norm; and of the
    chunked head one slope a state beside the state.

    It works in the larger of two that never meet. A chunk of the head has five times its logits: log-softmax, softmax,
    slope and gradient beside them. A layer's backward holds gradients of the MLP's three wide states and of two narrow
    ones; with checkpointing, its activations once more.
    """
    tokens = images * (prompt + model.image_tokens - 1)
    activations = layer_activations(model, dtype=dtype, sharded=sharded)
    stream = BFLOAT16 if dtype == "bfloat16" and sharded else FLOAT32
    layer, ends = stream * model.hidden if checkpointing else activations, 3 * FLOAT32 * model.hidden
    slopes = images * model.image_tokens * 2 * FLOAT32 * model.hidden
    kept = tokens * (model.layers * layer + ends) + slopes
    backward = WIDTH[dtype] * 3 * model.intermediate + 2 * FLOAT32 * model.hidden + activations * checkpointing
    return kept, max(5 * LOGITS_AT_ONCE * FLOAT32, tokens * backward)


def loading_bytes(model: ModelSizes) -> int:
    """While a rank starts: policy and reference whole in float32, before they are cut."""
    return 2 * model.total * FLOAT32
