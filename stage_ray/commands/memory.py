"""Bytes on one GPU by role, for a Janus model: pure functions of counts, which tests hold against small real models.

The published models: arXiv 2501.17811, table 1, and ``config.json`` of deepseek-ai/Janus-Pro-1B and -7B (the latter
leaves Llama's defaults unsaid). Both draw 24 x 24 tokens of 16384 codes in 8 dimensions, 384 x 384 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stage_ray.config.paths import PACKAGE, resolve_path
from stage_ray.errors import ConfigError

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
# Copies of constants of stage_ray.engines.vllm.engine and stage_ray.policies, which import torch; a test compares them.
LONGEST_PROMPT, LOGITS_AT_ONCE, DECODE_CHUNK = 256, 2**22, 16
CACHE_BLOCK = 16  # tokens; vLLM's default on GPUs
CONTEXT = int(1.5 * GIB)  # reserved: CUDA context, NCCL's buffers, cuBLAS workspaces
FRAGMENTS = 0.04  # reserved: share of a GPU that torch's allocator cannot hand out
CUDA_GRAPHS = int(1.5 * GIB)  # reserved for vLLM's captured decode steps
DECODER_MAPS = 4  # full-size feature maps alive at once: input, normed, convolved, shortcut
# Mask2Former Swin-S (69 M, arXiv 2112.01527), CLIP ViT-L/14 (428 M, arXiv 2103.00020) in float32, a batch of pictures.
REWARD = {"scorers": int(0.5e9) * FLOAT32, "activations": 3 * GIB}

Lines = dict[str, int]
"""What it is -> bytes."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What the formulas need of a model.

    Attributes:
        path: what ``policy.path`` of a config takes.
        base_channels: channels of the image decoder's feature maps at full size, ``side_pixels`` squared.
        layer, embedding, head, image_embedding, vqmodel: parameters of one decoder layer, the text embeddings, the
            image head, codebook and aligner of the image tokens, and the image tokenizer.
        frozen: parameters that are loaded and not trained.

    Example:
        >>> round(KNOWN["janus-pro-7b"].trained / 1e9, 2), KNOWN["janus-pro-7b"].image_tokens
        (6.49, 576)
    """

    name: str
    path: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    codes: int
    image_tokens: int
    side_pixels: int
    base_channels: int
    layer: int
    embedding: int
    head: int
    image_embedding: int
    vqmodel: int
    frozen: int

    @property
    def trained(self) -> int:
        """Parameters that are trained and published: layers, text embeddings, last norm."""
        return self.layers * self.layer + self.embedding + self.hidden

    @property
    def total(self) -> int:
        """Every parameter, a tied one once."""
        return self.trained + self.frozen


def _published(name: str, hub: str, hidden: int, intermediate: int, layers: int, heads: int) -> ModelSizes:
    aligner = (hidden + 1) * hidden
    head, image_embedding = aligner + (hidden + 1) * 16_384, 16_384 * 8 + 9 * hidden + aligner
    vqmodel, vision = 71_883_403, 303_688_704 + 1025 * hidden + aligner  # counted in transformers' own classes
    return ModelSizes(
        name=name,
        path=hub,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        codes=16_384,
        image_tokens=576,
        side_pixels=384,
        base_channels=128,
        layer=4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden,
        embedding=102_400 * hidden,
        head=head,
        image_embedding=image_embedding,
        vqmodel=vqmodel,
        frozen=head + image_embedding + vision + vqmodel,
    )


KNOWN = {
    "janus-pro-1b": _published("janus-pro-1b", "deepseek-community/Janus-Pro-1B", 2048, 5632, 24, 16),
    "janus-pro-7b": _published("janus-pro-7b", "deepseek-community/Janus-Pro-7B", 4096, 11_008, 30, 32),
}


def model_sizes(model: str) -> ModelSizes:
    """Sizes of a known name, or of a local checkpoint directory, whose ``config.json`` is enough.

    Raises:
        ConfigError: neither; or the directory holds no Janus config.

    Example:
        >>> model_sizes("Janus-Pro-1B").layers
        24
    """
    if known := KNOWN.get(model.lower()):
        return known
    if not model.startswith(PACKAGE) and not Path(model).expanduser().is_dir():
        raise ConfigError(
            f"--model {model} is neither known ({', '.join(KNOWN)}) nor a local directory with a config.json"
        )
    directory = resolve_path(model)
    if not (directory / "config.json").is_file():
        raise ConfigError(f"--model {model}: there is no config.json in it")
    import torch
    from transformers import AutoConfig, JanusConfig, JanusForConditionalGeneration

    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model}: its config.json is not readable: {error}") from error
    if not isinstance(config, JanusConfig):
        raise ConfigError(f"--model {model} is a {config.model_type!r} model; plans are for Janus models")
    with torch.device("meta"):  # shapes alone, no memory
        core = JanusForConditionalGeneration(config)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in core.model.named_children()}
    text, vq, llama = config.text_config, config.vq_config, core.model.language_model
    return ModelSizes(
        name=directory.name,
        path=model,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        codes=vq.num_embeddings,
        image_tokens=vq.num_patches**2,
        side_pixels=config.vision_config.image_size,
        base_channels=vq.base_channels,
        layer=sum(p.numel() for p in llama.layers[0].parameters()),
        embedding=llama.embed_tokens.weight.numel(),
        head=parts["generation_head"],
        image_embedding=parts["generation_embeddings"] + parts["generation_aligner"],
        vqmodel=parts["vqmodel"],
        frozen=sum(p.numel() for p in core.parameters()) - parts["language_model"],
    )


def width(dtype: str) -> int:
    """Bytes of a number.

    Example:
        >>> width("bfloat16")
        2
    """
    return {"float32": FLOAT32, "bfloat16": BFLOAT16}[dtype]


def room(gpu_gib: float) -> int:
    """Bytes of a GPU that a plan may fill."""
    return int(int(gpu_gib * GIB) * (1 - FRAGMENTS)) - CONTEXT


def cache_bytes(model: ModelSizes, *, tokens: int, dtype: str) -> int:
    """Key-value cache of one sequence in vLLM's whole blocks: two tensors a layer [kv heads, tokens, head dim].

    Example:
        >>> cache_bytes(KNOWN["janus-pro-7b"], tokens=832, dtype="bfloat16") // 2**20
        390
    """
    token = 2 * model.layers * model.kv_heads * model.head_dim * width(dtype)
    return -(-tokens // CACHE_BLOCK) * CACHE_BLOCK * token


def rollout_lines(model: ModelSizes, *, images: int, dtype: str) -> Lines:
    """A vLLM engine with ``images`` in flight, each a conditional and an unconditional sequence.

    Memory is kept for prompts of `LONGEST_PROMPT` tokens, as the engine itself does: the cache holds a whole batch, and
    vLLM tries out a prefill of every prompt at once (states and residual, MLP's gate, up and product).
    """
    size, sequences = width(dtype), 2 * images
    prefill = sequences * LONGEST_PROMPT * size * (4 * model.hidden + 3 * model.intermediate)
    logits = 5 * sequences * model.codes * FLOAT32  # both branches, guided, their softmax and noise
    maps = min(images, DECODE_CHUNK) * DECODER_MAPS * model.base_channels * model.side_pixels**2 * FLOAT32
    return {
        "weights": (model.trained + model.image_embedding) * size + model.head * FLOAT32,
        "KV cache": sequences * cache_bytes(model, tokens=LONGEST_PROMPT + model.image_tokens, dtype=dtype),
        "prefill, logits": max(prefill, logits),
        "CUDA graphs": CUDA_GRAPHS,
        "image decoder": model.vqmodel * FLOAT32 + maps,
    }


def images_in_flight(model: ModelSizes, gpu_gib: float, *, dtype: str, most: int = 1024) -> int:
    """The most images of a batch that fit one GPU, up to ``most``; 0 where not even the weights do."""
    counts = range(most, 0, -1)
    return next((n for n in counts if sum(rollout_lines(model, images=n, dtype=dtype).values()) <= room(gpu_gib)), 0)


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


def kept_bytes(model: ModelSizes, rows: int, prompt: int, dtype: str, sharded: bool, checkpointing: bool) -> int:
    """What a micro-batch of ``rows`` images keeps from its forward to its backward pass.

    Every layer's activations, or with checkpointing its input alone; embeddings and last norm; and of the chunked head
    one slope a state beside the state.
    """
    stream = BFLOAT16 if dtype == "bfloat16" and sharded else FLOAT32
    layer = stream * model.hidden if checkpointing else layer_activations(model, dtype=dtype, sharded=sharded)
    ends = 3 * FLOAT32 * model.hidden
    slopes = rows * model.image_tokens * 2 * FLOAT32 * model.hidden
    return rows * (prompt + model.image_tokens - 1) * (model.layers * layer + ends) + slopes


def working_bytes(model: ModelSizes, rows: int, prompt: int, dtype: str, sharded: bool, checkpointing: bool) -> int:
    """The larger of two that never meet: a chunk of the head's logits, and the backward pass of one layer.

    A chunk has five times its logits: log-softmax, softmax, slope and gradient beside them. A layer's backward holds
    gradients of the MLP's three wide states and of two narrow ones; with checkpointing, its activations once more.
    """
    layer = width(dtype) * 3 * model.intermediate + 2 * FLOAT32 * model.hidden
    if checkpointing:
        layer += layer_activations(model, dtype=dtype, sharded=sharded)
    return max(5 * LOGITS_AT_ONCE * FLOAT32, rows * (prompt + model.image_tokens - 1) * layer)


def learner_lines(model: ModelSizes, *, ranks: int, rows: int, dtype: str, checkpointing: bool) -> Lines:
    """One rank of the learner: FSDP2 shards in float32, two layers and the root gathered at a time.

    Frozen parts (image head, vision tower, tokenizer) are whole on every rank, for policy and reference each.
    """
    sharded = ranks > 1
    batch = (model, rows, LONGEST_PROMPT, dtype, sharded, checkpointing)
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
        "activations": kept_bytes(*batch),
        "backward, logits": working_bytes(*batch),
    }


def learner_loading(model: ModelSizes) -> int:
    """While a rank starts: policy and reference whole in float32, before they are cut."""
    return 2 * model.total * FLOAT32


def weight_bytes(model: ModelSizes) -> int:
    """One published version: the trained parameters in float32."""
    return model.trained * FLOAT32
