"""The sizes that a plan reckons with are those of real models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from stage_ray.commands.plan import model_sizes
from stage_ray.config.model_sizes import KNOWN, ModelSizes
from stage_ray.config.paths import resolve_path
from stage_ray.errors import ConfigError
from tests.tiny import tiny_janus

SHIPPED = "package:stage_ray/shapeworld/assets/janus"


def counted(model: JanusForConditionalGeneration) -> dict[str, int]:
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}


def same(sizes: ModelSizes, model: JanusForConditionalGeneration) -> None:
    parts = counted(model)
    assert sizes.trained == parts["language_model"]
    assert sizes.head == parts["generation_head"]
    assert sizes.image_embedding == parts["generation_embeddings"] + parts["generation_aligner"]
    assert sizes.vqmodel == parts["vqmodel"]
    assert sizes.total == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.layer == sum(p.numel() for p in model.model.language_model.layers[0].parameters())
    assert sizes.frozen == sizes.total - parts["language_model"]


@pytest.mark.parametrize("name", [name for name in KNOWN if name.startswith("janus")])
def test_a_published_model_has_as_many_parameters_as_transformers_makes_of_its_config(name):
    sizes = KNOWN[name]
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=sizes.embedding // sizes.hidden,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
        ),
        vision_config=JanusVisionConfig(projection_dim=sizes.hidden),
        vq_config=JanusVQVAEConfig(projection_dim=sizes.hidden, image_token_embed_dim=sizes.hidden),
    )
    with torch.device("meta"):
        model = JanusForConditionalGeneration(config).eval()
        with torch.no_grad():
            pixels = model.model.vqmodel.decode(torch.zeros(1, sizes.image_tokens, dtype=torch.int64))
    same(sizes, model)
    assert pixels.shape[-2:] == (sizes.side_pixels, sizes.side_pixels)


def test_a_tiny_checkpoint_is_counted_parameter_by_parameter(tmp_path):
    directory = tiny_janus(tmp_path / "janus")
    same(model_sizes(str(directory)), JanusForConditionalGeneration.from_pretrained(directory))


def test_the_shipped_model_is_as_large_as_its_file():
    sizes = model_sizes(SHIPPED)
    same(sizes, JanusForConditionalGeneration.from_pretrained(resolve_path(SHIPPED)))
    with safe_open(resolve_path(SHIPPED) / "model.safetensors", "pt") as file:
        names = file.keys()
        assert sizes.total == sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in names)
    assert (sizes.image_tokens, sizes.codes, sizes.side_pixels) == (64, 512, 64)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("janus-pro-3b", f"neither known ({', '.join(KNOWN)}) nor a local directory"),
        ("EMPTY", "no config.json"),
        ("LLAMA", "is of no family that can be planned: emu3, janus, llamagen"),
    ],
)
def test_a_model_that_cannot_be_planned_is_named(tmp_path: Path, model: str, why: str):
    directory = tmp_path / model
    if model.isupper():
        directory.mkdir()
        model = str(directory)
    if directory.name == "LLAMA":
        (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError) as error:
        model_sizes(model)
    assert why in str(error.value)
