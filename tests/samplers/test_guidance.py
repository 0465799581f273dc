"""How much guidance a token has: schedules over an image, groups without any, and a learner that knows both."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stage_ray.config import RolloutConfig, RunConfig
from stage_ray.engines import build_engine
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import find_benchmark
from stage_ray.evaluation.loop import conditions, requests_for
from stage_ray.learner.learner import Learner
from stage_ray.policies.static_decoder import StaticDecoder
from stage_ray.records import Prompt, RolloutGroup, RolloutRequest, drawn_unguided
from stage_ray.samplers import Context, SamplingParams, process_logits
from tests.learner_case import PROMPTS, score, tiny_run

TOKENS, FIRST, END = 10, 5.0, 2.0
SCHEDULES = ("constant", "linear", "cosine")


def literal_scale(kind: str, interval: tuple[float, float], token: int) -> float:
    """w of a token of an image of `TOKENS`, by the documented formulas."""
    if not round(interval[0] * TOKENS) <= token < round(interval[1] * TOKENS):
        return 1.0
    part = token / (TOKENS - 1)
    if kind == "constant":
        return FIRST
    if kind == "linear":
        return FIRST + (END - FIRST) * part
    return END + (FIRST - END) * 0.5 * (1 + math.cos(math.pi * part))


def scheduled(kind: str, interval: tuple[float, float], **more: object) -> RolloutConfig:
    end = END if kind != "constant" else 1.0
    own = {"guidance_scale": FIRST, "guidance_schedule": kind, "guidance_end": end, "guidance_interval": interval}
    return RolloutConfig.model_validate(own | more)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_token_has_the_scale_of_a_literal_loop_and_travels_as_plain_values(
    kind: str, interval: tuple[float, float]
) -> None:
    params = SamplingParams.of(scheduled(kind, interval, temperature=0.7))
    assert SamplingParams.load(json.loads(json.dumps(params.dump()))) == params
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, TOKENS, 6, generator=generator)
    context = Context(torch.arange(TOKENS), torch.zeros(TOKENS, TOKENS, dtype=torch.int64))
    found = process_logits(conditional, unconditional, params, context)
    for token in range(TOKENS):
        w, c, u = literal_scale(kind, interval, token), conditional[token], unconditional[token]
        expected = c / 0.7 if w == 1 else (u + w * (c - u)) / 0.7
        torch.testing.assert_close(found[token], expected)
        if w == 1:
            assert torch.equal(found[token], expected)


def test_images_without_guidance_are_drawn_from_the_conditional_branch_to_the_bit() -> None:
    conditional, unconditional = torch.randn(2, 3, 6)
    tokens, guided = torch.zeros(3, TOKENS, dtype=torch.int64), torch.tensor([True, False, True])
    for kind in SCHEDULES:
        params = SamplingParams.of(scheduled(kind, (0.0, 1.0)))
        positions = torch.tensor([0, 0, 5])
        mixed = process_logits(conditional, unconditional, params, Context(positions, tokens, guided))
        all_guided = process_logits(conditional, unconditional, params, Context(positions, tokens))
        assert torch.equal(mixed[1], conditional[1]) and torch.equal(mixed[guided], all_guided[guided])
        assert not torch.equal(all_guided[1], conditional[1])


def test_guidance_may_grow_from_none_and_a_schedule_asks_how_long_an_image_is() -> None:
    grows = {"guidance_scale": 1, "guidance_schedule": "linear", "guidance_end": 4}
    params = SamplingParams.of(RolloutConfig.model_validate(grows))
    assert params.guided and not params.plain
    with pytest.raises(ValueError, match="guidance schedule linear over .* needs the images' tokens"):
        process_logits(torch.zeros(1, 3), torch.zeros(1, 3), params)
    assert not SamplingParams.of(RolloutConfig(guidance_scale=1.0)).guided


@pytest.mark.parametrize(
    ("rollout", "sentence"),
    [
        ({"guidance_schedule": "square"}, "rollout.guidance_schedule = 'square': input should be 'constant', 'linear'"),
        ({"guidance_end": 3}, "rollout.guidance_end = 3 is read by a schedule; set rollout.guidance_schedule"),
        ({"guidance_end": 0.5}, "rollout.guidance_end = 0.5: input should be greater than or equal to 1"),
        ({"guidance_interval": [0.5, 0.5]}, "rollout.guidance_interval = [0.5, 0.5]: needs 0 <= low < high <= 1"),
        ({"guidance_interval": [0.5, 1.5]}, "rollout.guidance_interval = [0.5, 1.5]: needs 0 <= low < high <= 1"),
        ({"unguided_share": 1.5}, "rollout.unguided_share = 1.5: input should be less than or equal to 1"),
        ({"unguided_share": 0.5, "guidance_scale": 1}, "rollout.unguided_share = 0.5 leaves guidance out, and rollout"),
    ],
)
def test_guidance_that_cannot_be_is_named(rollout: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_run(Path("model"), rollout=rollout)
    assert sentence in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5, 1.0])
def test_the_share_holds_after_any_number_of_groups(share: float) -> None:
    unguided = np.cumsum([drawn_unguided(group, share) for group in range(200)])
    assert (np.abs(unguided - share * np.arange(1, 201)) < 1 + 1e-9).all() and unguided[-1] == round(200 * share)


def scheduled_run(model: Path, **algorithm: object) -> RunConfig:
    schedule = {"guidance_schedule": "cosine", "guidance_end": 2.0, "guidance_interval": [0.1, 0.8]}
    rollout = {"engine": "torch", "dtype": "float32", "guidance_scale": 4.0, "temperature": 0.8}
    return tiny_run(
        model,
        rollout=rollout | schedule | {"unguided_share": 1 / 3},
        algorithm={"correction": "none", **algorithm},
        pipeline={"max_staleness": 1},
    )


@pytest.fixture(scope="module")
def groups(model: Path) -> list[RolloutGroup]:
    """Three groups of one batch, the second without guidance."""
    run = scheduled_run(model)
    engine = build_engine(run.policy, run.rollout, worker="test")
    asked = [RolloutRequest(i, Prompt(i, text), (1, 2, 3), guided=i != 1) for i, text in enumerate(PROMPTS)]
    found = engine.generate(asked)
    engine.close()
    return found


def test_the_learner_makes_the_scheduled_distribution_of_each_group_again(
    model: Path, groups: list[RolloutGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage_ray.policies.base.LOGITS_AT_ONCE", 2**12)  # some tokens of an image at a time
    run = scheduled_run(model, ratio_on="guided")
    learner = Learner(run)
    assert [group.guided for group in groups] == [True, False, True]
    for group in groups:
        prompts = [learner.policy.codec.encode_prompt(group.prompt.text)] * len(group.tokens)
        tokens, mask = torch.from_numpy(group.tokens).long(), torch.full((3,), group.guided)
        made = learner.policy.guided_token_logprobs(prompts, tokens, SamplingParams.of(run.rollout), guided=mask)
        torch.testing.assert_close(made.guided_logprobs, torch.from_numpy(group.guided_logprobs), atol=1e-4, rtol=1e-4)
    learner.version = 1  # of the same weights, so that every ratio of the older groups is 1
    older = [dataclasses.replace(group, policy_version=0) for group in groups]
    metrics = learner.update(older, score(groups))
    assert metrics["ratio/max"] == pytest.approx(1.0, abs=1e-3)
    assert metrics["rollout/unguided"] == pytest.approx(1 / 3)


def test_a_learner_that_took_a_group_without_guidance_for_a_guided_one_would_see_other_ratios(
    model: Path, groups: list[RolloutGroup]
) -> None:
    learner = Learner(scheduled_run(model, ratio_on="guided"))
    learner.version = 1
    metrics = learner.update([dataclasses.replace(group, guided=True) for group in groups], score(groups))
    assert metrics["ratio/max"] > 1.1 and metrics["rollout/unguided"] == 0.0


def test_ar_grpo_trains_on_the_recorded_distribution(model: Path, groups: list[RolloutGroup]) -> None:
    run = scheduled_run(model).model_copy(update={"recipe": "ar_grpo"})
    learner = Learner(run)
    learner.version = 1
    metrics = learner.update(groups, score(groups))
    assert metrics["policy_loss"] == pytest.approx(0.0, abs=1e-3)  # advantages add up to 0 where every ratio is 1
    wrong = Learner(run)
    wrong.version = 1
    assumed = wrong.update([dataclasses.replace(group, guided=True) for group in groups], score(groups))
    assert abs(assumed["policy_loss"]) > 1e-2


def test_the_torch_engine_reads_no_unconditional_prompt_for_a_group_without_guidance(
    model: Path, groups: list[RolloutGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rows = scheduled_run(model), list[int]()
    engine, prefill = build_engine(run.policy, run.rollout, worker="test"), StaticDecoder.prefill

    def counted(decoder: StaticDecoder, prompts: list[tuple[int, ...]]) -> torch.Tensor:
        rows.append(len(prompts))
        return prefill(decoder, prompts)

    monkeypatch.setattr(StaticDecoder, "prefill", counted)
    asked = [RolloutRequest(i, Prompt(i, text), (1, 2, 3), guided=i != 1) for i, text in enumerate(PROMPTS)]
    mixed, (alone,) = engine.generate(asked), engine.generate(asked[1:2])
    assert rows == [15, 3]
    for one, other in zip(mixed, groups, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(alone.tokens, mixed[1].tokens)


def test_an_evaluation_has_the_configured_guidance_and_says_which_schedule(model: Path) -> None:
    run, plain = scheduled_run(model), tiny_run(model)
    asked = requests_for([Prompt(0, "a ring"), Prompt(1, "a cube")], 2, 7)
    assert all(request.guided for request in asked)
    said, usual = (conditions(one, find_benchmark("geneval"), asked, 7) for one in (run, plain))
    assert {key: said[key] for key in said.keys() - usual.keys()} == {
        "rollout.guidance_schedule": "cosine",
        "rollout.guidance_end": 2.0,
        "rollout.guidance_interval": [0.1, 0.8],
    }
