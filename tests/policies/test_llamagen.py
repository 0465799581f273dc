"""LlamaGen's published files say after conversion what their own architecture says, in both engines and the learner."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stage_ray.cli import main
from stage_ray.config import PolicyConfig
from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageEngine
from stage_ray.policies import load_policy
from stage_ray.policies.image_tokenizer import PictureDecoder
from stage_ray.policies.llamagen import LlamaGenPolicy
from stage_ray.policies.llamagen.classes import ClassNames, imagenet
from stage_ray.policies.llamagen.model import LlamaGenModel
from stage_ray.policies.llamagen.text import clean
from stage_ray.samplers import SamplingParams
from tests.engines.test_engines import assert_statistics_match, request, rollout, weights_of
from tests.policies.deepseek import CODES, PIXELS, SIDE, VQ, VQModel
from tests.policies.llamagen import CLASSES, TEXTS, Transformer, publish

CPU = torch.device("cpu")
CONDITIONS = ["class", "text"]


def convert(directory: Path, *options: str) -> Path:
    assert main(["convert", str(directory / "source"), str(directory / "out"), *options]) == 0
    return directory / "out"


def config(path: Path, **changes: str) -> PolicyConfig:
    return PolicyConfig.model_validate({"path": str(path), "family": "llamagen", **changes})


def policy_at(path: Path) -> LlamaGenPolicy:
    policy = load_policy(config(path), device=CPU)
    assert isinstance(policy, LlamaGenPolicy)
    return policy


def some_tokens(count: int) -> torch.Tensor:
    return torch.randint(0, CODES, (count, SIDE**2), generator=torch.Generator().manual_seed(1))


def originals_logits(original: Transformer, policy: LlamaGenPolicy, texts, tokens) -> list[torch.Tensor]:
    """What the original makes of tokens: conditional and unconditional logits."""
    ids = [policy.codec.encode_prompt(text) for text in texts]
    if original.condition == "class":
        return [
            original.of_classes(numbers, tokens) for numbers in ([i.conditional[0] for i in ids], [CLASSES] * len(ids))
        ]
    features = [policy.codec.prompt_features(prompt.conditional) for prompt in ids]
    return [original.of_captions(features, tokens, conditional=branch) for branch in (True, False)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("condition", "key"), [("class", "model"), ("class", None), ("text", "module"), ("text", "ema")]
)
def test_logits_and_pictures_are_those_of_the_original_architecture(condition, key, tmp_path):
    original, tokenizer = publish(tmp_path / "source", condition, key=key)
    policy, texts, tokens = policy_at(convert(tmp_path)), TEXTS[condition], some_tokens(3)
    ids = [policy.codec.encode_prompt(text) for text in texts]
    expected = originals_logits(original, policy, texts, tokens)
    for branch, logits in zip(("conditional", "unconditional"), expected, strict=True):
        found = policy.image_logits([getattr(prompt, branch) for prompt in ids], tokens)
        assert logits.std() > 0.5
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.5
    pictures = tokenizer.decode_code(tokens)
    assert pictures.std() > 0.1
    torch.testing.assert_close(PictureDecoder(policy.model.vq)(tokens, policy.codec.grid), pictures, rtol=0, atol=1e-4)
    greys = torch.clamp(127.5 * pictures + 128.0, 0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert (policy.codec.decode(tokens).int() - greys.int()).abs().max() <= 1
    assert policy.codec.decode(tokens).shape == (3, PIXELS, PIXELS, 3)


def test_five_levels_make_sixteen_pixels_of_a_token(tmp_path, monkeypatch):
    monkeypatch.setitem(VQ, "channel_multiplier", [1, 1, 1, 2, 2])
    _, tokenizer = publish(tmp_path / "source", "class")
    (tmp_path / "source" / "config.json").write_text(json.dumps({"num_attention_heads": 2, "image_size": 16 * SIDE}))
    policy = policy_at(convert(tmp_path))
    with torch.no_grad():
        pictures = PictureDecoder(policy.model.vq)(some_tokens(1), policy.codec.grid)
        torch.testing.assert_close(pictures, tokenizer.decode_code(some_tokens(1)), rtol=0, atol=1e-4)
    assert policy.codec.grid == (SIDE, SIDE) and policy.codec.config.pixels == 16 * SIDE == pictures.shape[-1]


@pytest.fixture(scope="module", params=CONDITIONS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llamagen")
    publish(directory / "source", request.param)
    return convert(directory)


@pytest.fixture(scope="module")
def other(checkpoint: Path) -> Path:
    """The same model at other trained weights."""
    policy = policy_at(checkpoint)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    policy.save(checkpoint.with_name("other"))
    return checkpoint.with_name("other")


def texts_of(checkpoint: Path) -> tuple[str, ...]:
    return TEXTS[json.loads((checkpoint / "config.json").read_text())["condition"]]


@pytest.fixture(scope="module", params=["torch", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ImageEngine]:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    engine = build_engine(config(checkpoint), rollout(request.param), worker=f"test-{request.param}")
    assert isinstance(engine, ImageEngine)
    yield engine
    engine.close()


def test_what_is_recorded_is_what_a_full_forward_says_guided_or_not_at_every_version(
    engine: ImageEngine, checkpoint: Path, other: Path
) -> None:
    requests = [request(text, (3, 50 + index), index) for index, text in enumerate(texts_of(checkpoint))]
    for version, path in enumerate([checkpoint, other, checkpoint]):
        policy = policy_at(path)
        if version:
            engine.load_weights(version, weights_of(policy))
        for params in (engine.params, SamplingParams(), SamplingParams(guidance_scale=3.0, temperature=0.8, top_k=20)):
            for group in engine.generate(requests, params):
                assert group.policy_version == version and group.images.shape == (2, PIXELS, PIXELS, 3)
                assert_statistics_match(group, policy, params)


def test_a_seed_gives_one_image_whatever_the_company_and_its_captions_lengths(
    engine: ImageEngine, checkpoint: Path
) -> None:
    texts = texts_of(checkpoint)
    alone = engine.generate([request(texts[1], (42,))])[0].tokens[0]
    mixed = engine.generate([request(texts[2], (9, 8)), request(texts[1], (7, 42, 1), group_id=1)])[1].tokens[1]
    assert alone.tolist() == mixed.tolist()
