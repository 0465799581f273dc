"""Bytes that one rank of the learner needs, as a function of counts; tests hold it against real updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from stage_ray.config.lora import LoraConfig
from stage_ray.config.model_sizes import BFLOAT16, FLOAT32, WIDTH, ModelSizes

LOGITS_AT_ONCE = 2**22  # that of `stage_ray.policies.base`, which imports torch; a test compares them
CONTEXT = int(1.5 * 2**30)  # reserved on a GPU: CUDA context, NCCL's buffers, cuBLAS workspaces
FRAGMENTS = 0.04  # reserved: share of a GPU that torch's allocator cannot hand out
MOST_IMAGES = 32  # of a micro-batch that is chosen: more make no update faster

Cut = tuple[int, bool]
"""How an update is cut: images of a micro-batch, and whether their activations are recomputed."""


def fillable(space: int) -> int:
    """Bytes that an update may fill of so many that a GPU has."""
    return int(space * (1 - FRAGMENTS)) - CONTEXT


def possible_cuts(most: int, checkpointing: bool | None = None) -> list[Cut]:
    """Ways to cut up to ``most`` images, fastest first: large micro-batches as they are, then any with recomputing.

    ``checkpointing``: only with, or only without it.
    """
    halves = [most >> halvings for halvings in range(most.bit_length())]
    if checkpointing is not None:
        return [(images, checkpointing) for images in halves]
    return [(images, False) for images in halves[:3]] + [(images, True) for images in halves]


def first_fit(cuts: Iterable[Cut], space: int, memory: Callable[..., dict[str, int]]) -> Cut | None:
    """The first cut that fits ``space`` bytes; ``memory`` is `learner_memory` with all else given."""
    return next((cut for cut in cuts if sum(memory(images=cut[0], checkpointing=cut[1]).values()) <= space), None)


def learner_memory(
    model: ModelSizes,
    *,
    ranks: int,
    images: int,
    prompt: int,
    dtype: str,
    checkpointing: bool,
    reference_dtype: str | None = None,
    offload: bool = False,
    lora: LoraConfig | None = None,
) -> dict[str, int]:
    """Bytes by what they hold in the policy's pass: FSDP2 shards in float32, two layers and the root gathered.

    Frozen parts (image head, embedding of image tokens) are whole on every rank, for policy and reference each. With
    adapters there is one model: frozen weights, of which the matrices are in the reference's dtype.

    Args:
        images, prompt: images of one micro-batch, and tokens before the image's.
        dtype: what the layers compute in; ``bfloat16`` is autocast on one rank, FSDP2's mixed precision on more.
        reference_dtype: what the reference's layers are kept in; None is ``dtype``.
        offload: whether the reference is elsewhere while the policy runs.
        lora: the adapters, where they are trained and not the weights.
    """
    sharded = ranks > 1
    kept, working = batch_bytes(
        model, images=images, prompt=prompt, dtype=dtype, sharded=sharded, checkpointing=checkpointing, lora=lora
    )
    shard, frozen = -(-model.trained // ranks) * FLOAT32, (model.head + model.image_embedding) * FLOAT32
    narrow = (reference_dtype or dtype) == "bfloat16"
    saved = (FLOAT32 - BFLOAT16) * -(-model.layers * model.matrices // ranks) if narrow else 0
    adapters = adapter_parameters(model, lora)  # of a layer
    copies = WIDTH[dtype] * (2 * (model.layer + adapters) + model.embedding)
    of_unit = adapters if lora else max(model.layer, model.embedding)  # a gradient before and while it is summed
    reduced = (WIDTH[dtype] + FLOAT32) * of_unit
    cast = adapters + (0 if lora and narrow else model.layer)
    casts = BFLOAT16 * model.layers * cast if dtype == "bfloat16" else 0  # autocast keeps what it cast
    trained = -(-model.layers * adapters // ranks) * FLOAT32 if lora else shard
    models = {"weights": shard - saved, "adapters": trained} if lora else {"weights": shard}
    return {
        **models,
        **({} if lora else {"reference": 0 if offload else shard - saved}),
        "gradients": trained,
        "optimizer": 2 * trained,
        "frozen parts": frozen if offload or lora else 2 * frozen,
        "gathered shards": copies + reduced if sharded else casts,
        "activations": kept,
        "backward, logits": working,
        **({"text encoder": BFLOAT16 * model.text_encoder} if model.text_encoder else {}),
    }


def adapter_parameters(model: ModelSizes, lora: LoraConfig | None) -> int:
    """Numbers in the adapters of one layer: rank rows of A and as many columns of B for each matrix; 0 without any."""
    if lora is None:
        return 0
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    sides = {  # what a matrix reads and what it makes
        "q_proj": model.hidden + queries,
        "k_proj": model.hidden + keys,
        "v_proj": model.hidden + keys,
        "o_proj": queries + model.hidden,
        "gate_proj": model.hidden + model.intermediate,
        "up_proj": model.hidden + model.intermediate,
        "down_proj": model.intermediate + model.hidden,
    }
    return lora.rank * sum(sides.get(name, 0) for name in lora.target_modules)


def layer_activations(model: ModelSizes, *, dtype: str, sharded: bool, lora: LoraConfig | None = None) -> int:
    """Bytes that one layer keeps for its backward pass, a token; attention by a fused kernel, so no L x L scores.

    Counted in `stage_ray.policies.llama`: the states before both norms with a factor each; attention's q, k, v, its
    result and the log-sum of each head, in float32 (on a GPU narrower, which is not reckoned with); the input of the
    output matrix; the MLP's gate and up; and of each adapter what is between its two matrices. Under FSDP2 the states
    are bfloat16. A shared prompt is counted as often as it is an image's.
    """
    queries = model.heads * model.head_dim
    stream = BFLOAT16 if dtype == "bfloat16" and sharded else FLOAT32
    attention = FLOAT32 * (2 * queries + 2 * model.kv_heads * model.head_dim + model.heads)
    between = lora.rank * len(lora.target_modules) if lora else 0
    narrow = WIDTH[dtype] * (queries + 2 * model.intermediate + between)
    return 2 * (stream * model.hidden + FLOAT32) + attention + narrow


def batch_bytes(
    model: ModelSizes,
    *,
    images: int,
    prompt: int,
    dtype: str,
    sharded: bool,
    checkpointing: bool,
    lora: LoraConfig | None = None,
) -> tuple[int, int]:
    """What a micro-batch keeps from its forward to its backward pass, and what it works in beside that.

    Kept are every layer's activations, or with checkpointing its input alone; embeddings and last norm; and of the
    chunked head one slope a state beside the state. It works in the larger of two that never meet: a chunk of the head
    (logits, log-softmax, softmax, slope, gradient), and a layer's backward (gradients of the MLP's three wide states
    and of two narrow ones; with checkpointing, its activations once more).
    """
    tokens = images * (prompt + model.image_positions - 1)
    activations = layer_activations(model, dtype=dtype, sharded=sharded, lora=lora)
    stream = BFLOAT16 if dtype == "bfloat16" and sharded else FLOAT32
    layer, ends = stream * model.hidden if checkpointing else activations, 3 * FLOAT32 * model.hidden
    slopes = images * model.image_tokens * 2 * FLOAT32 * model.hidden
    kept = tokens * (model.layers * layer + ends) + slopes
    backward = WIDTH[dtype] * 3 * model.intermediate + 2 * FLOAT32 * model.hidden + activations * checkpointing
    return kept, max(5 * LOGITS_AT_ONCE * FLOAT32, tokens * backward)


def loading_bytes(model: ModelSizes) -> int:
    """Of the machine's own memory while a rank starts: one model whole, in float32 and as its file has it (bfloat16).

    What the rank keeps goes to its GPU; on a CPU it stays beside what is loaded next.
    """
    return model.total * (FLOAT32 + BFLOAT16) + BFLOAT16 * model.text_encoder
