"""Sizes of a Janus model: parameters by part, cache and pictures, from a published config or a local ``config.json``.

The two published models (hidden size, layers, heads, vocabulary): Janus-Pro, arXiv 2501.17811, table 1, and
``config.json`` of deepseek-ai/Janus-Pro-1B and -7B on the Hugging Face hub, which leaves Llama's defaults for 7B
(hidden 4096, intermediate 11008, 32 heads) unsaid. Both draw 24 x 24 tokens of a codebook of 16384 in 8 dimensions,
384 x 384 pixels (LlamaGen's tokenizer with 16 pixels a token).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stage_ray.config.paths import PACKAGE, resolve_path
from stage_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What the formulas need of a model; all that ends in no unit is a count.

    Attributes:
        path: what ``policy.path`` of a config takes.
        head_in, projection: inputs of the two matrices of the image head.
        aligner_layers: matrices from a codebook vector to a state.
        vision: parameters of the tower and aligner that only understanding needs; loaded all the same.
        vqmodel: parameters of the image tokenizer.
        decode_flops: operations to turn one image's tokens into pixels.
        side_pixels: edge of the square picture; ``base_channels`` the widest feature maps at that size.

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
    vocabulary: int
    codes: int
    code_dim: int
    head_in: int
    projection: int
    aligner_layers: int
    image_tokens: int
    side_pixels: int
    base_channels: int
    vision: int
    vqmodel: int
    decode_flops: float
    tied: bool = True

    @property
    def layer(self) -> int:
        """One decoder layer: q and o, k and v, three matrices of the MLP, two norms (Llama; no biases)."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Text embeddings."""
        return self.vocabulary * self.hidden

    @property
    def trained(self) -> int:
        """What STAGE trains and publishes: layers, text embeddings, last norm."""
        return self.layers * self.layer + self.embedding + self.hidden

    @property
    def head(self) -> int:
        """The image head: two matrices with biases; frozen, computed in float32."""
        return (self.head_in + 1) * self.projection + (self.projection + 1) * self.codes

    @property
    def image_embedding(self) -> int:
        """Codebook vectors to states: embeddings and aligner; frozen."""
        later = (self.aligner_layers - 1) * (self.projection + 1) * self.projection
        return self.codes * self.code_dim + (self.code_dim + 1) * self.projection + later

    @property
    def frozen(self) -> int:
        """All that is loaded and not trained."""
        text_head = 0 if self.tied else self.embedding
        return self.head + self.image_embedding + self.vision + self.vqmodel + text_head

    @property
    def total(self) -> int:
        """Every parameter, a tied one once."""
        return self.trained + self.frozen

    @property
    def decoder(self) -> int:
        """All decoder layers: what is multiplied for every token beside the image head."""
        return self.layers * self.layer

    @property
    def cache(self) -> int:
        """Numbers that one token leaves in the key-value cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def picture_bytes(self) -> int:
        """One decoded picture, uint8 [H, W, 3]."""
        return 3 * self.side_pixels**2


def _published(name: str, hub: str, hidden: int, intermediate: int, layers: int, heads: int) -> ModelSizes:
    tower = 303_688_704  # SigLIP-L/16 at 384 pixels, counted in transformers' JanusVisionModel
    aligner = (1024 + 1) * hidden + (hidden + 1) * hidden
    return ModelSizes(
        name=name,
        path=hub,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=102_400,
        codes=16_384,
        code_dim=8,
        head_in=hidden,
        projection=hidden,
        aligner_layers=2,
        image_tokens=576,
        side_pixels=384,
        base_channels=128,
        vision=tower + aligner,
        vqmodel=71_883_403,  # counted in transformers' JanusVQVAE, as are the operations of its decoder
        decode_flops=5.701e11,
    )


KNOWN = {
    "janus-pro-1b": _published("janus-pro-1b", "deepseek-community/Janus-Pro-1B", 2048, 5632, 24, 16),
    "janus-pro-7b": _published("janus-pro-7b", "deepseek-community/Janus-Pro-7B", 4096, 11_008, 30, 32),
}


def model_sizes(model: str) -> ModelSizes:
    """Sizes of a known name, or of a local checkpoint directory (its ``config.json`` is enough).

    Raises:
        ConfigError: neither; or the directory holds no Janus config.

    Example:
        >>> model_sizes("Janus-Pro-1B").layers
        24
    """
    known = KNOWN.get(model.lower())
    if known is not None:
        return known
    if not model.startswith(PACKAGE) and not Path(model).expanduser().is_dir():
        raise ConfigError(
            f"--model {model} is neither known ({', '.join(KNOWN)}) nor a local directory with a config.json"
        )
    return _from_config(model, resolve_path(model))


def _from_config(model: str, directory: Path) -> ModelSizes:
    """Count what a config describes by building it without memory (torch's meta device)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, JanusConfig, JanusForConditionalGeneration

    if not (directory / "config.json").is_file():
        raise ConfigError(f"--model {model}: there is no config.json in it")
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model}: its config.json is not readable: {error}") from error
    if not isinstance(config, JanusConfig):
        raise ConfigError(f"--model {model} is a {config.model_type!r} model; plans are for Janus models")
    with torch.device("meta"):
        core = JanusForConditionalGeneration(config).eval()
        image_tokens = config.vq_config.num_patches**2
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            core.model.vqmodel.decode(torch.zeros(1, image_tokens, dtype=torch.int64))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in core.model.named_children()}
    text, vq = config.text_config, config.vq_config
    return ModelSizes(
        name=directory.name,
        path=model,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        vocabulary=text.vocab_size,
        codes=vq.num_embeddings,
        code_dim=vq.embed_dim,
        head_in=vq.image_token_embed_dim,
        projection=vq.projection_dim,
        aligner_layers=vq.num_hidden_layers,
        image_tokens=image_tokens,
        side_pixels=config.vision_config.image_size,
        base_channels=vq.base_channels,
        vision=counts["vision_model"] + counts["aligner"],
        vqmodel=counts["vqmodel"],
        decode_flops=float(counter.get_total_flops()),
        tied=core.lm_head.weight is core.model.language_model.embed_tokens.weight,
    )
