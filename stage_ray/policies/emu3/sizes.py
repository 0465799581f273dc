"""How large an Emu3 model is, from its config alone."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3Processor

from stage_ray.config.model_sizes import ModelSizes
from stage_ray.policies.emu3.grid import grid_of


def checkpoint_sizes(directory: Path, path: str) -> ModelSizes:
    """Sizes of a local checkpoint; see `stage_ray.policies.base.Policy.sizes`."""
    config = Emu3Config.from_pretrained(directory)
    grid = grid_of(Emu3Processor.from_pretrained(directory), config, directory)
    return config_sizes(config, grid, directory.name, path)


def config_sizes(config: Emu3Config, grid: tuple[int, int], name: str, path: str) -> ModelSizes:
    """Sizes of the model that a config describes, drawing a ``grid`` of image tokens (rows, columns)."""
    with torch.device("meta"):  # shapes alone, no memory
        model = Emu3ForConditionalGeneration(config)

    def count(part: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    text, vq, codes = config.text_config, model.model.vqmodel, config.vq_config.codebook_size
    layers, (rows, columns) = model.model.text_model.layers, grid
    return ModelSizes(
        name=name,
        path=path,
        family="emu3",
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=layers[0].self_attn.head_dim,
        codes=codes,
        image_tokens=rows * columns,
        forced=rows - 1,
        side_pixels=round((rows * columns) ** 0.5 * vq.spatial_scale_factor),
        base_channels=config.vq_config.base_channels * config.vq_config.temporal_downsample_factor,  # frames
        decoded_at_once=1,
        layer=count(layers[0]),
        embedding=text.vocab_size * text.hidden_size,
        head=codes * text.hidden_size,
        image_embedding=0,
        vqmodel=count(vq),
        frozen=count(vq) + count(model.lm_head),
    )
