"""The CLIP reward on a small random CLIP checkpoint of the real classes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.records import Prompt
from stage_ray.rewards import build_rewards, check_rewards
from tests.rewards.checkpoints import save_clip

TEXTS = ("a photo of a ring", "a red photo of red", "ring")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def clip(path: Path, **options):
    return build_rewards([RewardConfig(type="clip", options={"path": str(path), "device": "cpu", **options})])[0][1]


def case(count: int) -> tuple[np.ndarray, list[Prompt]]:
    images = np.random.default_rng(0).integers(256, size=(count, 64, 64, 3), dtype=np.uint8)
    return images, [Prompt(i, TEXTS[i % len(TEXTS)]) for i in range(count)]


def test_the_score_is_the_cosine_that_transformers_computes(checkpoint: Path):
    images, prompts = case(3)
    output = clip(checkpoint).score(images, prompts)
    model = CLIPModel.from_pretrained(checkpoint).eval()
    tokens = PreTrainedTokenizerFast.from_pretrained(checkpoint)(
        [p.text for p in prompts], padding=True, return_tensors="pt"
    )
    pixels = CLIPImageProcessorPil.from_pretrained(checkpoint)(list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        joint = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    expected = (joint.logits_per_image / model.logit_scale.exp()).diagonal().detach().numpy()
    np.testing.assert_allclose(output.scores, expected, atol=1e-5)
    assert output.valid.all() and output.details[0]["cosine"] == pytest.approx(float(expected[0]), abs=1e-5)


def test_the_batch_size_does_not_change_scores(checkpoint: Path):
    images, prompts = case(7)
    whole, cut = clip(checkpoint).score(images, prompts), clip(checkpoint, batch_size=2).score(images, prompts)
    np.testing.assert_allclose(whole.scores, cut.scores, atol=1e-5)


def test_scale_multiplies_the_cosine(checkpoint: Path):
    images, prompts = case(2)
    np.testing.assert_allclose(
        clip(checkpoint, scale=2.5).score(images, prompts).scores, 2.5 * clip(checkpoint).score(images, prompts).scores
    )


def test_a_prompt_beyond_the_context_length_is_cut(checkpoint: Path):
    images, _ = case(1)
    assert clip(checkpoint).score(images, [Prompt(0, "a photo of a red ring " * 20)]).valid.all()


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="has no config.json; give a Hugging Face model directory"):
        clip(tmp_path)


def cut(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


LAYER = "text_model.encoder.layers.0.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: cut(d, lambda t: t.pop(LAYER)), f"lacks 1 tensors, the first is {LAYER}"),
        (lambda d: cut(d, lambda t: t.update({LAYER: t[LAYER][:3].clone()})), "3, 16], but config.json makes it"),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "janus"}'),
            "a 'janus' model, but it needs 'clip' or 'siglip'",
        ),
        (lambda d: (d / "tokenizer.json").write_text("{"), "has no usable tokenizer"),
        (lambda d: (d / "preprocessor_config.json").unlink(), "has no usable image processor"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin alone, a pickle"),
    ],
)
def test_a_checkpoint_that_would_score_with_random_weights_is_refused_before_and_when_it_is_loaded(
    checkpoint: Path, tmp_path: Path, change, sentence: str
):
    directory = Path(shutil.copytree(checkpoint, tmp_path / "clip"))
    change(directory)
    configs = [RewardConfig(type="clip", options={"path": str(directory)})]
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        check_rewards(configs, [])
    assert str(caught.value).startswith("rewards.0.options of clip: path: ")
    with pytest.raises(ConfigError):
        build_rewards(configs)


def test_weights_that_are_not_finite_are_refused_when_they_are_loaded(checkpoint: Path, tmp_path: Path):
    directory = Path(shutil.copytree(checkpoint, tmp_path / "clip"))
    cut(directory, lambda tensors: tensors[LAYER].view(-1)[:1].fill_(float("nan")))
    with pytest.raises(ConfigError, match=f"tensor {LAYER} holds 1 values that are not finite"):
        clip(directory)
