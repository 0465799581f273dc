"""How large a LlamaGen model is, from its config alone."""

from __future__ import annotations

import torch

from stage_ray.config.model_sizes import FLAN_T5_XL, ModelSizes
from stage_ray.policies.llamagen.model import LlamaGenConfig, LlamaGenModel


def config_sizes(config: LlamaGenConfig, name: str, path: str) -> ModelSizes:
    """Sizes of the model that a config describes; a text encoder is reckoned with as flan-t5-xl's."""
    with torch.device("meta"):  # shapes alone, no memory
        model = LlamaGenModel(config)

    def count(part: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    layers, text = model.transformer.layers, config.condition == "text"
    return ModelSizes(
        name=name,
        path=path,
        family="llamagen",
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        codes=config.codes,
        image_tokens=config.side**2,
        prompt_tokens=config.prompt_tokens,
        side_pixels=config.pixels,
        base_channels=config.base_channels,
        layer=count(layers[0]),
        embedding=count(model.gpt) - count(layers) - config.hidden_size,  # of prompts and image tokens, and the head
        head=0,
        image_embedding=0,
        vqmodel=count(model.vq),
        frozen=count(model) - count(model.gpt),
        text_encoder=FLAN_T5_XL if text else 0,
        text_features=config.caption_width if text else 0,
    )
