"""TPSO: images of one group are drawn from prompts that are moved apart, as far as the band allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.engines import build_engine
from stage_ray.engines.torch import TorchEngine
from stage_ray.errors import ConfigError
from stage_ray.learner.batch import LearnerError
from stage_ray.learner.learner import Learner
from stage_ray.policies import load_policy
from stage_ray.policies.janus import JanusPolicy
from stage_ray.records import Prompt, RolloutGroup, RolloutRequest
from stage_ray.run.preflight import preflight
from stage_ray.samplers import TRANSFORMS, EmbeddingTransform, load_transform
from stage_ray.samplers.tpso import TpsoTransform, likeness
from tests import learner_case
from tests.runs import tiny_run as whole_run

TEXTS = ("a photo of a red circle", "a photo of two green squares and a blue ring")
SEEDS = (3, 1, 4, 15)
BAND = {"kappa": 0.8, "tau": 0.02}
OPTIONS = {**BAND, "mix": 1.0}


def rollout(**settings: object) -> RolloutConfig:
    chosen = {"engine": "torch", "dtype": "float32", "guidance_scale": 2.0, "prompt_transform": "tpso"}
    return RolloutConfig.model_validate(chosen | {"prompt_transform_options": OPTIONS} | settings)


def requests(*numbers: int) -> list[RolloutRequest]:
    return [RolloutRequest(number, Prompt(number, TEXTS[number]), SEEDS) for number in numbers]


def drawn(model: Path, *numbers: int, **settings: object) -> list[RolloutGroup]:
    engine = build_engine(PolicyConfig(path=str(model)), rollout(**settings), worker="test")
    groups = engine.generate(requests(*numbers))
    engine.close()
    return groups


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[TorchEngine]:
    engine = TorchEngine(PolicyConfig(path=str(model)), rollout(), worker="test")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def policy(model: Path) -> JanusPolicy:
    policy = load_policy(PolicyConfig(path=str(model)), device=torch.device("cpu"))
    assert isinstance(policy, JanusPolicy)
    return policy


@pytest.fixture(scope="module")
def groups(engine: TorchEngine) -> list[RolloutGroup]:
    return engine.generate(requests(0, 1))


def moved(engine: TorchEngine, text: str, seeds: Sequence[int] = SEEDS, **options: float) -> Tensor:
    return engine.moved(TpsoTransform(**(OPTIONS | options)), engine.encode_prompt(text).conditional, seeds)


@torch.no_grad()
def pooled(policy: JanusPolicy, embeds: Tensor) -> Tensor:
    """Mean of transformers' own last hidden states, at unit length: [n, hidden]."""
    states = policy.model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return normalize(states.mean(dim=1), dim=-1)


@torch.no_grad()
def embedded(policy: JanusPolicy, text: str) -> Tensor:
    ids = torch.tensor([policy.codec.encode_prompt(text).conditional])
    return policy.model.model.language_model.embed_tokens(ids)  # [1, L, hidden]


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_lie_inside_the_band_and_are_less_alike_than_without_the_diversity_term(
    engine: TorchEngine, policy: JanusPolicy, text: str
) -> None:
    own = pooled(policy, embedded(policy, text))
    found, alike = {}, {}
    for diversity in (0.0, 1.0):
        found[diversity] = pooled(policy, moved(engine, text, diversity=diversity))
        cosines = found[diversity] @ own[0]
        assert ((cosines - BAND["kappa"]).abs() <= BAND["tau"] + 1e-4).all(), cosines
        alike[diversity] = likeness(found[diversity], len(SEEDS)).item() + 1
    assert alike[1.0] < alike[0.0] < 1


def test_likeness_is_the_mean_cosine_of_a_literal_double_loop_less_one() -> None:
    vectors = normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [vectors[i] @ vectors[j] for i in range(5) for j in range(5) if i != j]
    assert likeness(vectors, 5).item() == pytest.approx(float(sum(pairs)) / len(pairs) - 1, abs=1e-6)
    assert likeness(vectors[:1], 5).item() == pytest.approx(0.0, abs=1e-6)  # the last one to go on is not pushed away
    assert likeness(vectors[:1], 1).item() == pytest.approx(-1.0, abs=1e-6)


def test_one_image_alone_is_moved_into_the_band_too(engine: TorchEngine, policy: JanusPolicy) -> None:
    cosine = pooled(policy, moved(engine, TEXTS[0], seeds=(7,)))[0] @ pooled(policy, embedded(policy, TEXTS[0]))[0]
    assert cosine.item() == pytest.approx(BAND["kappa"], abs=BAND["tau"] + 1e-4)


def test_an_image_that_the_steps_do_not_bring_into_the_band_stays_nearest_to_it(
    engine: TorchEngine, policy: JanusPolicy
) -> None:
    own = pooled(policy, embedded(policy, TEXTS[0]))[0]
    far = [1 - pooled(policy, moved(engine, TEXTS[0], steps=steps, lr=1e-3)) @ own for steps in (1, 3, 5)]
    assert (far[0] < far[1]).all() and (far[1] < far[2]).all() and (far[2] < 1 - BAND["kappa"]).all()


def test_mix_keeps_a_share_of_the_offsets(engine: TorchEngine, policy: JanusPolicy) -> None:
    base = embedded(policy, TEXTS[0])
    whole, half, none = (moved(engine, TEXTS[0], mix=mix) - base for mix in (1.0, 0.5, 0.0))
    torch.testing.assert_close(half, 0.5 * whole)
    assert none.abs().max() == 0.0 and whole.abs().max() > 0.01


def test_records_are_those_of_a_teacher_forced_forward_over_the_moved_prompts(
    engine: TorchEngine, policy: JanusPolicy, groups: list[RolloutGroup]
) -> None:
    for group in groups:
        embeds, tokens = moved(engine, group.prompt.text), torch.from_numpy(group.tokens).long()
        with torch.no_grad():
            read = torch.cat([embeds, policy.embed_image_tokens(tokens[:, :-1])], dim=1)
            states = policy.model.model.language_model(inputs_embeds=read, use_cache=False).last_hidden_state
            logp = policy.head(states[:, embeds.shape[1] - 1 :]).log_softmax(-1)
        expected = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.from_numpy(group.logprobs), expected, atol=2e-3, rtol=2e-3)
        assert group.prompt.drawn_text == group.prompt.text


def test_a_group_has_the_same_images_in_any_company_and_cut(
    engine: TorchEngine, model: Path, groups: list[RolloutGroup]
) -> None:
    (alone,) = engine.generate(requests(1))
    np.testing.assert_array_equal(alone.tokens, groups[1].tokens)
    for one, other in zip(drawn(model, 1, 0, images_per_batch=3), groups[::-1], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_offsets_that_are_not_mixed_in_change_nothing(model: Path, groups: list[RolloutGroup]) -> None:
    off = drawn(model, 0, 1, prompt_transform_options={"mix": 0.0, "steps": 1})
    plain = drawn(model, 0, 1, prompt_transform=None, prompt_transform_options={})
    for one, other, far in zip(off, plain, groups, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert (one.tokens != far.tokens).any(axis=1).all()


def test_a_learner_scores_the_images_under_the_prompt_itself_with_ratios_against_what_drew_them(
    model: Path, policy: JanusPolicy, engine: TorchEngine, groups: list[RolloutGroup]
) -> None:
    run = learner_case.tiny_run(model, algorithm={"correction": "none"}, rollout={"guidance_scale": 2.0})
    for group in groups:
        prompt = policy.codec.encode_prompt(group.prompt.text)
        moved = engine.moved(engine._transform, prompt.conditional, SEEDS)  # type: ignore[arg-type]
        assert group.embeds is not None and group.embeds.dtype == np.float32
        np.testing.assert_allclose(group.embeds, moved.numpy(), atol=1e-6)
    ratios = []
    for group in groups:
        prompts = [policy.codec.encode_prompt(group.prompt.text).conditional] * len(SEEDS)
        with torch.no_grad():
            now = policy.token_logprobs(prompts, torch.from_numpy(group.tokens).long()).logprobs
        ratios.append((now - torch.from_numpy(group.logprobs)).exp())
    metrics = Learner(run).update(groups, learner_case.score(groups))
    assert "mismatch/abs_logprob" not in metrics and "mismatch/with_drift_abs_logprob" not in metrics
    logs = torch.stack(ratios).log().abs()
    assert metrics["mismatch/moved_abs_logprob"] == pytest.approx(logs.mean().item(), rel=1e-3) and logs.mean() > 0.05
    assert metrics["ratio/mean"] == pytest.approx(torch.stack(ratios).mean().item(), rel=1e-3)
    as_drawn = [dataclasses.replace(group, embeds=None) for group in groups]
    with pytest.raises(LearnerError, match="rollout and learner differ by"):
        Learner(run).update(as_drawn, learner_case.score(groups))


def test_it_is_for_the_torch_engine_families_that_embed_prompts_and_trains_where_that_is_accepted(
    plain: Path, tmp_path: Path
) -> None:
    assert "tpso" in TRANSFORMS.names() and isinstance(load_transform(rollout()), EmbeddingTransform)
    with pytest.raises(ConfigError, match=r"rollout.prompt_transform = 'tpso' .* set rollout.engine=torch"):
        load_transform(rollout(engine="vllm"))
    run = whole_run(tmp_path, plain, rollout={"prompt_transform": "tpso"})
    with pytest.raises(ConfigError, match=r"policy.family = 'tests.plain.Plain.*' .* rollout.prompt_transform=null"):
        build_engine(run.policy, run.rollout, worker="test")
    with pytest.raises(ConfigError, match=r"'tpso' would train on .* set it to null .*_options.off_policy=true"):
        preflight(run)
    accepted = {"prompt_transform": "tpso", "prompt_transform_options": {"off_policy": True}}
    assert preflight(whole_run(tmp_path, plain, rollout=accepted)).train
