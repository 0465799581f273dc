"""Scorers of human preference on small random models under their published names, against plain torch."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, Dinov2Model, SiglipConfig, SiglipModel
from transformers.models.auto.tokenization_auto import AutoTokenizer

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.records import Prompt
from stage_ray.rewards import build_rewards, check_rewards
from stage_ray.rewards.hps import MEAN, STD, longest_side_padded
from tests.rewards.checkpoints import CLIP_WORDS, save_clip, save_dino, save_head, save_hps, save_image_reward
from tests.rewards.published import OpenClip
from tests.rewards.test_clip import case


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def built(kind: str, **options):
    """A scorer through the public path, checked first."""
    config = RewardConfig(type=kind, options=options | {"device": "cpu"})
    assert check_rewards([config], [Prompt(0, "ring")]) == []
    return build_rewards([config])[0][1]


def refusal(kind: str, **options) -> str:
    """What is said of options, before a run and when the scorer is built."""
    config = RewardConfig(type=kind, options=options | {"device": "cpu"})
    with pytest.raises(ConfigError) as before:
        check_rewards([config], [])
    with pytest.raises(ConfigError):
        build_rewards([config])
    return str(before.value)


def pixels_of(images: np.ndarray, size: int) -> torch.Tensor:
    """Square images as CLIP's preparation makes them."""
    pictures = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images]
    pixels = torch.tensor(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, OpenClip]:
    return save_hps(tmp_path_factory.mktemp("hps"))


@torch.no_grad()
def test_hps_is_the_cosine_of_the_published_architecture(hps):
    path, architecture, model = hps
    images, prompts = case(3)
    options = {"path": str(path), "processor": str(architecture)}
    output = built("hps", **options).score(images, prompts)
    tokens = AutoTokenizer.from_pretrained(architecture)([p.text for p in prompts], padding=True, return_tensors="pt")
    last = tokens["input_ids"].argmax(-1)  # open_clip's end of a text: CLIP's end token has the highest id
    expected = model.cosines(longest_side_padded(images, 32), tokens["input_ids"], last)
    np.testing.assert_allclose(output.scores, expected, atol=1e-5)
    assert output.valid.all() and output.features.shape == (3, 8)
    scaled = built("hps", **options, scale=100.0).score(images, prompts)
    np.testing.assert_allclose(scaled.scores, 100 * output.scores, rtol=1e-5)


def test_hps_pads_the_short_side_with_black():
    images = np.full((1, 20, 40, 3), 255, np.uint8)
    pixels = longest_side_padded(images, 16)
    white, black = ((torch.tensor([level]) - torch.tensor(MEAN)) / torch.tensor(STD) for level in (1.0, 0.0))
    assert pixels.shape == (1, 3, 16, 16)
    torch.testing.assert_close(pixels[0, :, 4:12], white.view(3, 1, 1).expand(3, 8, 16), atol=1e-5, rtol=0)
    for rows in (slice(0, 4), slice(12, 16)):
        torch.testing.assert_close(pixels[0, :, rows], black.view(3, 1, 1).expand(3, 4, 16), atol=1e-5, rtol=0)


def test_an_hps_file_that_does_not_fit_is_refused_by_tensor(hps, tmp_path):
    path, architecture, model = hps
    state = model.state_dict()
    name = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    new = "vision_model.encoder.layers.1.mlp.fc1.weight"
    processor = {"processor": str(architecture)}
    torch.save({"state_dict": {k: v for k, v in state.items() if k != name}}, tmp_path / "a.pt")
    assert f"lacks tensor {new}" in refusal("hps", path=str(tmp_path / "a.pt"), **processor)
    torch.save({"state_dict": state | {name: state[name][:3].clone()}}, tmp_path / "b.pt")
    assert f"tensor {new} is [3, 16], not [64, 16]" in refusal("hps", path=str(tmp_path / "b.pt"), **processor)
    (tmp_path / "c.pt").write_bytes(path.read_bytes()[:2000])
    assert "cannot be read as weights" in refusal("hps", path=str(tmp_path / "c.pt"), **processor)
    torch.save({"state_dict": state | {name: torch.full_like(state[name], torch.inf)}}, tmp_path / "d.pt")
    with pytest.raises(ConfigError, match=f"tensor {new} holds 1024 values that are not finite"):
        build_rewards([RewardConfig(type="hps", options={"path": str(tmp_path / "d.pt"), **processor})])


class Evil:
    """What a pickle may hold."""

    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, hps, capsys):
    torch.save({"state_dict": {"x": Evil()}}, tmp_path / "evil.pt")
    said = refusal("hps", path=str(tmp_path / "evil.pt"), processor=str(hps[1]))
    assert "cannot be read as weights" in said and "this must not run" not in capsys.readouterr().out


def test_pickscore_multiplies_by_the_checkpoints_own_scale(clip_directory):
    images, prompts = case(2)
    cosines = built("clip", path=str(clip_directory)).score(images, prompts).scores
    scale = float(CLIPModel.from_pretrained(clip_directory).logit_scale.exp())
    output = built("pickscore", path=str(clip_directory), processor=str(clip_directory), divide_by=26.0)
    np.testing.assert_allclose(output.score(images, prompts).scores, cosines * scale / 26, rtol=1e-5)


@torch.no_grad()
def test_the_aesthetic_head_sees_unit_vectors(clip_directory, tmp_path):
    head = save_head(tmp_path / "head.pth")
    images, prompts = case(4)
    output = built("aesthetic", head=str(tmp_path / "head.pth"), path=str(clip_directory)).score(images, prompts)
    vectors = torch.tensor(built("clip", path=str(clip_directory)).score(images, prompts).features)
    np.testing.assert_allclose(vectors.norm(dim=-1), 1, atol=1e-5)
    np.testing.assert_allclose(output.scores, head(vectors).squeeze(-1), atol=1e-5)
    said = refusal("aesthetic", head=str(tmp_path / "missing.pth"), path=str(clip_directory))
    assert "missing.pth does not exist" in said


@torch.no_grad()
def test_image_reward_is_blips_first_token_through_the_published_head(clip_directory, tmp_path):
    vision, text, head = save_image_reward(tmp_path / "ImageReward.pt")
    options = {"path": str(tmp_path / "ImageReward.pt"), "processor": str(clip_directory)}
    images, prompts = case(3)
    output = built("image_reward", **options).score(images, prompts)
    tokens = AutoTokenizer.from_pretrained(clip_directory)(
        [p.text for p in prompts], padding="max_length", max_length=35, return_tensors="pt"
    )
    seen = vision(pixels_of(images, 32))
    mask = tokens["attention_mask"]
    read = text(tokens["input_ids"], attention_mask=mask, encoder_hidden_states=seen).last_hidden_state[:, 0]
    expected = (head(read).squeeze(-1) - 0.16717362830052426) / 1.0333394966054072
    np.testing.assert_allclose(output.scores, expected, atol=1e-4)
    state = torch.load(tmp_path / "ImageReward.pt", weights_only=True)
    torch.save({name: value for name, value in state.items() if "qkv.weight" not in name}, tmp_path / "cut.pt")
    assert re.search(
        r"lacks tensor \S+qkv\.weight", refusal("image_reward", **options | {"path": str(tmp_path / "cut.pt")})
    )


@torch.no_grad()
def test_siglip_fills_its_context_and_has_no_mask(clip_directory, tmp_path):
    torch.manual_seed(4)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": len(CLIP_WORDS), "max_position_embeddings": 8, "pad_token_id": 0}
    model = SiglipModel(
        SiglipConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8})
    ).eval()
    model.save_pretrained(tmp_path)
    images, prompts = case(3)
    output = built("clip", path=str(tmp_path), processor=str(clip_directory)).score(images, prompts)
    tokens = AutoTokenizer.from_pretrained(clip_directory)(
        [p.text for p in prompts], padding="max_length", max_length=8, truncation=True, return_tensors="pt"
    )
    joint = model(input_ids=tokens["input_ids"], pixel_values=pixels_of(images, 32))
    expected = (F.normalize(joint.image_embeds, dim=-1) * F.normalize(joint.text_embeds, dim=-1)).sum(-1)
    np.testing.assert_allclose(output.scores, expected, atol=1e-4)


@torch.no_grad()
def test_features_are_dinos_and_the_score_is_the_distance_to_the_others(clip_directory, tmp_path):
    save_dino(tmp_path)
    scorer = built("features", path=str(tmp_path))
    images, _ = case(3)
    images[1] = images[0]
    groups = [SimpleNamespace(images=images), SimpleNamespace(images=images[:1])]
    output = scorer.score_groups(groups)
    vectors = torch.tensor(output.features)
    expected = F.normalize(
        Dinov2Model.from_pretrained(tmp_path).eval()(pixels_of(images, 32)).last_hidden_state[:, 0], dim=-1
    )
    np.testing.assert_allclose(vectors[:3], expected, atol=1e-4)
    cosine = vectors[:3] @ vectors[:3].T
    np.testing.assert_allclose(output.scores[0], 1 - (cosine[0, 1] + cosine[0, 2]) / 2, atol=1e-5)
    assert output.scores[0] == pytest.approx(output.scores[1], abs=1e-5) and output.valid.tolist() == [True] * 3 + [
        False
    ]


def test_bfloat16_is_close(clip_directory):
    images, prompts = case(2)
    full, half = (
        built("clip", path=str(clip_directory), dtype=d).score(images, prompts) for d in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(full.scores, half.scores, atol=0.03)
    assert not np.array_equal(full.scores, half.scores)
