"""Janus models of any size with random weights, for timing only: their pictures are noise."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoProcessor,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)
from transformers.utils.logging import disable_progress_bar

from stage_ray.config.paths import resolve_path

SHIPPED = "package:stage_ray/shapeworld/assets/janus"
PATCH = 8  # pixels of one token's side


@dataclass(frozen=True, slots=True)
class ModelSize:
    """How large a model is; ``side`` is the number of tokens along one side of the square picture.

    Example:
        >>> FIFTY_MILLION.side**2
        256
    """

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    codes: int
    side: int


FIFTY_MILLION = ModelSize("50m", hidden=512, layers=12, heads=8, intermediate=1536, codes=16384, side=16)
SMALL = ModelSize("small", hidden=128, layers=2, heads=2, intermediate=256, codes=1024, side=8)


def write_model(directory: Path, size: ModelSize, seed: int = 0) -> Path:
    """Write a checkpoint of transformers' own Janus classes with the shipped model's processor; its directory.

    Example:
        path = write_model(scratch / "50m", FIFTY_MILLION)
    """
    disable_progress_bar()
    shipped = resolve_path(SHIPPED)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(_config(JanusConfig.from_pretrained(shipped), size))
    model.generation_config = GenerationConfig.from_pretrained(shipped)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    AutoProcessor.from_pretrained(shipped).save_pretrained(directory)
    return directory


@contextmanager
def model_of(size: ModelSize | None) -> Iterator[str]:
    """The shipped model, or a larger one that is made now and removed afterwards."""
    if size is None:
        yield SHIPPED
        return
    with tempfile.TemporaryDirectory(prefix="stage-ray-bench-model-") as directory:
        yield str(write_model(Path(directory), size))


def _config(shipped: JanusConfig, size: ModelSize) -> JanusConfig:
    text = shipped.text_config
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=text.vocab_size,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=size.side**2 + 128,
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
            tie_word_embeddings=True,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=size.side * PATCH,
            patch_size=PATCH,
            mlp_ratio=1.0,
            projection_dim=size.hidden,
            depth=1,
            num_image_tokens=size.side**2,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=size.codes,
            latent_channels=64,
            base_channels=32,
            channel_multiplier=[1, 1, 2, 2],
            num_res_blocks=1,
            projection_dim=size.hidden,
            image_token_embed_dim=size.hidden,
        ),
        image_token_id=shipped.image_token_id,
    )
