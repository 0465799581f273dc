"""A Janus model of any size with random weights, for pretraining, benchmarks and tests; and what a model is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessorPil,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from stage_ray.config.model_sizes import ModelSizes
from stage_ray.config.paths import PACKAGE, resolve_path
from stage_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class JanusSizes:
    """How large each part of a Janus model is. What has a default suits a small model.

    Attributes:
        hidden, layers, heads, intermediate: of the language model.
        kv_heads, head_dim: None is one key head for each head, and ``hidden / heads``.
        vocabulary: rows of the text embedding.
        prompt_tokens: longest prompt; positions are this and the image's tokens.
        tied: whether the text head shares the embedding's weights.
        codes: V, entries of the image codebook.
        side: image tokens along one side of the square image, T = side**2.
        channel_multiplier: width of each level of the image tokenizer; every level but one halves the resolution.
        latent_channels, base_channels, res_blocks: of the image tokenizer.
        aligner_layers: of the projection behind the image encoder, which generation never runs.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int
    codes: int
    side: int
    kv_heads: int | None = None
    head_dim: int | None = None
    vocabulary: int = 64
    prompt_tokens: int = 64
    tied: bool = True
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2)
    latent_channels: int = 64
    base_channels: int = 32
    res_blocks: int = 1
    aligner_layers: int = 1

    @property
    def image_pixels(self) -> int:
        """Pixels along one side of the image."""
        return self.side * 2 ** (len(self.channel_multiplier) - 1)


def build_vq_config(sizes: JanusSizes) -> JanusVQVAEConfig:
    """The image tokenizer's config, in which transformers keeps the sizes of the generation aligner and head too."""
    return JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=sizes.codes,
        latent_channels=sizes.latent_channels,
        base_channels=sizes.base_channels,
        channel_multiplier=list(sizes.channel_multiplier),
        num_res_blocks=sizes.res_blocks,
        num_patches=sizes.side,
        projection_dim=sizes.hidden,
        image_token_embed_dim=sizes.hidden,
    )


def build_model(
    sizes: JanusSizes, tokenizer: PreTrainedTokenizerFast, *, guidance_scale: float = 3.0, seed: int | None = None
) -> JanusForConditionalGeneration:
    """A float32 model with random weights and the settings that transformers' own image sampling reads.

    Args:
        tokenizer: has ``bos``, ``eos``, ``pad``, ``image`` and ``boi`` tokens.
        seed: of the weights; None draws them from torch's global generator.
    """
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = JanusForConditionalGeneration(build_config(sizes, tokenizer))
    model.generation_config = generation_config(tokenizer, guidance_scale)
    return model.eval()


def build_config(sizes: JanusSizes, tokenizer: PreTrainedTokenizerFast) -> JanusConfig:
    """The whole model's config, as `build_model` takes it."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads or sizes.heads,
        head_dim=sizes.head_dim or sizes.hidden // sizes.heads,
        max_position_embeddings=sizes.side**2 + sizes.prompt_tokens,
        tie_word_embeddings=sizes.tied,
        **special,
    )
    vision = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=sizes.image_pixels,
        patch_size=sizes.image_pixels // sizes.side,
        mlp_ratio=1.0,
        projection_dim=sizes.hidden,
        depth=sizes.aligner_layers,
        num_image_tokens=sizes.side**2,
    )
    image = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
    vq = build_vq_config(sizes)
    return JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=image)


def generation_config(tokenizer: PreTrainedTokenizerFast, guidance_scale: float) -> GenerationConfig:
    """What transformers' own image sampling reads: the ids of special tokens, temperature and guidance."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        guidance_scale=guidance_scale,
        generation_kwargs={"boi_token_id": tokenizer.convert_tokens_to_ids(tokenizer.boi_token)},
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )


def build_processor(sizes: JanusSizes, tokenizer: PreTrainedTokenizerFast, chat_template: str) -> JanusProcessor:
    """Tokenizer, chat template and image processor (pixels to -1..1) as one."""
    images = JanusImageProcessorPil(
        size={"height": sizes.image_pixels, "width": sizes.image_pixels},
        min_size=sizes.image_pixels,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return JanusProcessor(images, tokenizer, chat_template=chat_template, num_image_tokens=sizes.side**2)


def write_checkpoint(directory: Path, model: JanusForConditionalGeneration, processor: JanusProcessor) -> Path:
    """Write weights, configs, tokenizer and template; the directory, made if it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def checkpoint_sizes(model: str) -> ModelSizes:
    """Sizes of a local Janus checkpoint, of which ``config.json`` is enough; a ConfigError where that is damaged."""
    directory = resolve_path(model) if model.startswith(PACKAGE) else Path(model).expanduser()
    try:
        config = JanusConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model}: its config.json is not readable: {error}") from error
    return config_sizes(config, directory.name, model)


def config_sizes(config: JanusConfig, name: str, path: str) -> ModelSizes:
    """Sizes of the model that a config describes."""
    with torch.device("meta"):  # shapes alone, no memory
        core = JanusForConditionalGeneration(config)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in core.model.named_children()}
    text, vq, llama = config.text_config, config.vq_config, core.model.language_model
    return ModelSizes(
        name=name,
        path=path,
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
