"""Token rules: what they do to logits, options checked by name, and a learner that knows what the engine drew from."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stage_ray.config import RolloutConfig
from stage_ray.engines import build_engine
from stage_ray.errors import ConfigError
from stage_ray.learner.learner import Learner
from stage_ray.records import Prompt, RolloutRequest
from stage_ray.samplers import SAMPLERS, Context, SamplingParams, process_logits
from stage_ray.samplers.entropy_informed import EntropyInformedRule
from tests.learner_case import PROMPTS, score, tiny_run
from tests.rules import NoRepeats, Wide

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]])
OTHER = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [40.0, 0.0, 0.0, 0.0]])


def rollout(sampler: str, **options: object) -> RolloutConfig:
    return RolloutConfig(sampler=sampler, sampler_options=options)


def test_the_rooms_files_are_the_names_and_guided_changes_no_bit_of_the_published_formula() -> None:
    assert SAMPLERS.names() == ["entropy_informed", "guided", "retrieval"]
    assert SamplingParams.of(RolloutConfig()) == SamplingParams(guidance_scale=5.0)
    found = process_logits(LOGITS, OTHER, SamplingParams(guidance_scale=5.0, temperature=0.7))
    assert torch.equal(found, (OTHER + 5.0 * (LOGITS - OTHER)) / 0.7)


@pytest.mark.parametrize("options", [{}, {"a": 0.4, "b": 0.5, "c": 0.7}])
def test_the_temperature_follows_the_entropy_of_the_guided_logits(options: dict[str, float]) -> None:
    params = SamplingParams(guidance_scale=2.0, temperature=1.5, rule=EntropyInformedRule(**options))
    found = process_logits(LOGITS, OTHER, params)
    a, b, c = (options.get(name, published) for name, published in (("a", 2.5), ("b", 3.0), ("c", 0.6)))
    for row, conditional, unconditional in zip(found.tolist(), LOGITS.tolist(), OTHER.tolist(), strict=True):
        guided = [u + 2.0 * (x - u) for x, u in zip(conditional, unconditional, strict=True)]
        total = math.fsum(math.exp(x) for x in guided)
        entropy = -math.fsum(math.exp(x) / total * (x - math.log(total)) for x in guided)
        temperature = 1.5 * (a * math.exp(-entropy / b) + c)
        assert row == pytest.approx([x / temperature for x in guided], rel=1e-5, abs=1e-5)


def test_published_constants_cool_a_large_vocabulary_and_not_one_of_512_tokens() -> None:
    params = SamplingParams(rule=EntropyInformedRule())
    for vocabulary, temperature in ((16384, 0.698), (512, 0.9125)):
        flat = torch.zeros(1, vocabulary)
        flat[0, 0] = 1e-3  # so that what the temperature did is seen
        assert flat[0, 0] / process_logits(flat, None, params)[0, 0] == pytest.approx(temperature, abs=1e-3)


def test_top_k_and_top_p_cut_what_the_temperature_left() -> None:
    rule = EntropyInformedRule()
    params = SamplingParams(top_k=3, top_p=0.9, rule=rule)
    whole = process_logits(LOGITS[:1], None, SamplingParams(rule=rule))
    found = process_logits(LOGITS[:1], None, params)
    assert torch.equal(found, params.truncate(whole)) and torch.isinf(found[0, 3])


def test_logits_of_minus_infinity_have_no_part_in_the_entropy() -> None:
    params = SamplingParams(rule=EntropyInformedRule())
    logits = torch.tensor([[1.0, 0.5, -torch.inf]])
    found = process_logits(logits, None, params)
    torch.testing.assert_close(found[:, :2], process_logits(logits[:, :2], None, params))


def test_a_rule_sees_the_tokens_before_its_own_only() -> None:
    tokens = torch.tensor([[3, 1, 2], [3, 0, 0]])
    assert Context(torch.tensor([2, 1]), tokens).tokens.tolist() == [[3, 1, -1], [3, -1, -1]]
    params = SamplingParams(rule=NoRepeats(window=1, penalty=9.0))
    found = process_logits(LOGITS[:2], None, params, Context(torch.tensor([2, 0]), tokens))
    assert (LOGITS[:2] - found).tolist() == [[0.0, 9.0, 0.0, 0.0], [0.0] * 4]


def test_parameters_travel_as_plain_values_with_a_rule_from_outside_the_package() -> None:
    params = SamplingParams.of(rollout("tests.rules.NoRepeats", window="3"))
    assert params.rule == NoRepeats(window=3) and not params.plain
    assert SamplingParams.load(json.loads(json.dumps(params.dump()))) == params


@pytest.mark.parametrize(
    ("sampler", "options", "sentence"),
    [
        ("entropy_informd", {}, "rollout.sampler = 'entropy_informd' is no known sampler; did you mean 'entropy_inf"),
        ("tests.rules.Nothing", {}, "module 'tests.rules' has no 'Nothing'"),
        ("nowhere.Rule", {}, "no module named 'nowhere'"),
        ("json.loads", {}, "is no class that derives from stage_ray.samplers.TokenRule"),
        ("stage_ray.samplers.TokenRule", {}, "is no class that derives from stage_ray.samplers.TokenRule"),
        ("guided", {"a": 1}, "rollout.sampler_options.a = 1 is no option of sampler guided: it has none"),
        ("tests.rules.NoRepeats", {"windw": 1}, "did you mean 'rollout.sampler_options.window'?"),
        ("tests.rules.NoRepeats", {"window": 0}, "rollout.sampler_options.window = 0: input should be greater"),
        ("entropy_informed", {"b": "hot"}, "rollout.sampler_options.b = 'hot': input should be a valid number"),
        ("entropy_informed", {"c": math.inf}, "rollout.sampler_options.c = inf: input should be a finite number"),
    ],
)
def test_a_rule_or_option_that_cannot_be_is_named(sampler: str, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingParams.of(rollout(sampler, **options))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_rule_that_changes_the_vocabulary_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"Wide gives \(3, 5\) for logits \(3, 4\)"):
        process_logits(LOGITS, None, SamplingParams(rule=Wide()))


@pytest.mark.parametrize("sampler", ["entropy_informed", "tests.rules.NoRepeats"])
def test_the_learner_knows_the_distribution_that_the_engine_drew_from(
    model: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage_ray.policies.base.LOGITS_AT_ONCE", 2**12)  # some tokens of an image at a time
    run = tiny_run(
        model,
        rollout={"engine": "torch", "dtype": "float32", "guidance_scale": 3.0, "sampler": sampler},
        algorithm={"ratio_on": "guided", "correction": "none"},
        pipeline={"max_staleness": 1},
    )
    engine = build_engine(run.policy, run.rollout, worker="test")
    groups = engine.generate([RolloutRequest(i, Prompt(i, text), (1, 2, 3)) for i, text in enumerate(PROMPTS)])
    engine.close()
    learner = Learner(run)
    for group in groups:
        prompts = [learner.policy.codec.encode_prompt(group.prompt.text)] * len(group.tokens)
        tokens = torch.from_numpy(group.tokens).long()
        found = learner.policy.guided_token_logprobs(prompts, tokens, SamplingParams.of(run.rollout)).guided_logprobs
        torch.testing.assert_close(found, torch.from_numpy(group.guided_logprobs), atol=1e-4, rtol=1e-4)
        assert np.abs(group.guided_logprobs - group.logprobs).max() > 0.1
    learner.version = 1  # of the same weights, so that every ratio of the older groups is 1
    metrics = learner.update([dataclasses.replace(group, policy_version=0) for group in groups], score(groups))
    assert metrics["ratio/max"] == pytest.approx(1.0, abs=1e-3) and metrics["staleness/mean"] == 1.0
