"""GenEval's arithmetic: requests, means, standard errors, and what becomes of images that no scorer could judge."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage_ray.errors import ConfigError, RunError
from stage_ray.evaluation import Benchmark
from stage_ray.evaluation.base import EvaluationResult, find_benchmark, read_result, write_result
from stage_ray.evaluation.base import summarise as summarise_with
from stage_ray.evaluation.loop import (
    EngineBackend,
    JudgedGroup,
    conditions,
    evaluate,
    judge_in_batches,
    requests_for,
)
from stage_ray.evaluation.metrics import MetricValue
from stage_ray.observability.progress import Progress
from stage_ray.records import Prompt, RolloutGroup, RolloutRequest, ScoredGroup, image_seeds
from stage_ray.rewards.base import RewardOutput
from stage_ray.run.heldout import HeldOutEvaluation
from tests.runs import tiny_run


def prompt(index: int, tag: str | None) -> Prompt:
    return Prompt(index, f"prompt {index}", {"tag": tag} if tag else {})


def scored(group_id: int, verdicts: Sequence[bool | None]) -> ScoredGroup:
    """A group judged by a column "eyes" (None: it failed) beside one called "clip" that says 0.25 of everything."""
    valid = np.asarray([[verdict is not None, True] for verdict in verdicts])
    scores = np.asarray([[np.nan if verdict is None else 0.5 + verdict / 2, 0.25] for verdict in verdicts], np.float32)
    details = tuple(
        {
            "eyes": {"error": "no answer"}
            if verdict is None
            else {"verdict": verdict, "soft": 0.5 + verdict / 2, "reason": ""},
            "clip": {"cosine": 0.25},
        }
        for verdict in verdicts
    )
    return ScoredGroup(group_id, ("eyes", "clip"), scores, valid, details, 0.1)


def summarise(prompts: Sequence[Prompt], groups: Sequence[ScoredGroup]) -> EvaluationResult:
    return summarise_with(find_benchmark("geneval"), prompts, groups)


def tasks(result: EvaluationResult) -> dict[str, float]:
    """Value of each task, in the order of the result."""
    return {name: result.metrics[name].value for name in result.metrics["GenEval"].parts}


PROMPTS = [prompt(0, "colors"), prompt(1, "colors"), prompt(2, "position")]
GROUPS = [scored(0, [True, True]), scored(1, [True, False]), scored(2, [False, False])]


def test_the_headline_is_the_mean_over_tasks_not_over_images():
    result = summarise(PROMPTS, GROUPS)
    assert tasks(result) == {"colors": 0.75, "position": 0.0}
    assert result.headline == "GenEval" and result.headline_value == 0.375  # over images it would be 0.5
    assert (len(result.images), result.metrics["GenEval"].images) == (6, 6)
    assert result.metrics["soft score"].value == pytest.approx(0.75)
    assert result.scores == {"eyes": pytest.approx(0.75), "clip": pytest.approx(0.25)}


def test_standard_errors_take_prompts_as_units():
    metrics = summarise(PROMPTS, GROUPS).metrics
    colors, position = metrics["colors"], metrics["position"]
    assert colors.error == pytest.approx(np.std([1.0, 0.5], ddof=1) / math.sqrt(2))
    assert position.error == 0.0 and (len(position.by_prompt), position.images) == (1, 2)
    assert metrics["GenEval"].error == pytest.approx(colors.error / 2)


def test_groups_may_come_in_any_order():
    assert summarise(PROMPTS, GROUPS[::-1]) == summarise(PROMPTS, GROUPS)


def test_prompts_without_a_tag_are_one_task():
    result = summarise([prompt(0, None), prompt(1, None)], [scored(0, [True]), scored(1, [False])])
    assert list(tasks(result)) == ["all"] and result.headline_value == 0.5


def test_an_image_that_no_scorer_could_judge_counts_in_no_mean():
    result = summarise([prompt(0, "colors")], [scored(0, [True, None])])
    assert result.headline_value == 1.0 and result.metrics["colors"].images == 1
    assert len(result.images) - result.metrics["GenEval"].images == 1
    assert result.images[1]["details"]["eyes"] == {"error": "no answer"}
    assert result.images[1]["scores"] == {"eyes": None, "clip": 0.25}


def test_without_any_verdict_there_is_no_score():
    result = summarise([prompt(0, "colors")], [scored(0, [None, None])])
    assert (result.headline_value, result.metrics) == (None, {})
    assert result.scores["eyes"] is None


@pytest.mark.parametrize("groups", [GROUPS[:2], [*GROUPS, GROUPS[0]], [*GROUPS[:2], scored(7, [True])]])
def test_every_prompt_needs_exactly_one_group(groups: list[ScoredGroup]):
    with pytest.raises(ValueError, match="each needs exactly one"):
        summarise(PROMPTS, groups)


def test_a_result_survives_json_exactly_and_holds_no_nan(tmp_path: Path):
    odd = scored(2, [None, False])
    odd.details[0]["eyes"]["distance"] = math.nan
    result = summarise(PROMPTS, [GROUPS[0], GROUPS[1], odd])
    path = tmp_path / "after.json"
    write_result(path, result, policy_version=3)
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["policy_version"] == 3
    assert read_result(path) == result
    path.write_text('{"benchmark": "geneval", "score": 0.5}')
    with pytest.raises(
        RunError, match=r"after.json is not an evaluation \(headline: .*; remove it to go on without it"
    ):
        read_result(path)


def test_seeds_depend_on_the_prompt_and_not_on_its_company():
    everything = requests_for(PROMPTS, 4, seed=20)
    alone = requests_for(PROMPTS[2:], 4, seed=20)
    assert [request.group_id for request in everything] == [0, 1, 2]
    assert alone[0].seeds == everything[2].seeds and alone[0].group_id == 0
    assert len({seed for request in everything for seed in request.seeds}) == 12
    assert requests_for(PROMPTS, 4, seed=21)[0].seeds != everything[0].seeds
    assert all(0 <= seed < 2**63 for request in everything for seed in request.seeds)


def test_an_evaluation_shares_no_noise_with_training():
    trained = {seed for group in range(200) for seed in image_seeds(20, group, 8)}
    judged = {seed for request in requests_for(PROMPTS, 8, seed=20) for seed in request.seeds}
    assert not trained & judged


class EvenSeeds:
    """An engine whose pictures say whether their seed is even."""

    policy_version = 0

    def generate(self, requests: Sequence[RolloutRequest]) -> list[RolloutGroup]:
        return [self._group(request) for request in requests]

    def _group(self, request: RolloutRequest) -> RolloutGroup:
        count = len(request.seeds)
        images = np.zeros((count, 4, 4, 3), np.uint8)
        images[:, 0, 0, 0] = [seed % 2 == 0 for seed in request.seeds]
        none = np.zeros((count, 1), np.float32)
        tokens = none.astype(np.int32)
        return RolloutGroup(
            request.group_id, request.prompt, request.seeds, tokens, none, none, none, none, images, 0, "w", 0.0
        )


class Eyes:
    """Finds a picture correct when its first pixel is 1."""

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        good = images[:, 0, 0, 0] == 1
        details = tuple({"verdict": bool(one), "soft": float(one), "reason": ""} for one in good)
        return RewardOutput(good.astype(np.float32), np.ones(len(good), bool), details)


def test_evaluate_draws_judges_and_sums_up_every_prompt_in_batches():
    prompts = [prompt(i, "colors" if i % 2 else "position") for i in range(40)]
    finished: list[int] = []
    backend = EngineBackend(EvenSeeds(), [("eyes", Eyes())])
    benchmark = find_benchmark("geneval")
    result = asyncio.run(evaluate(backend, benchmark, requests_for(prompts, 3, seed=1), finished.append))
    even = [seed % 2 == 0 for request in requests_for(prompts, 3, 1) for seed in request.seeds]
    assert [image["details"]["eyes"]["verdict"] for image in result.images] == even
    assert sum(finished) == 40 and len(finished) > 1 and len(result.images) == 120
    assert 0.2 < result.headline_value < 0.8


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("evaluation.seed", {"evaluation": {"seed": 21}}),
        ("evaluation.images_per_prompt", {"evaluation": {"images_per_prompt": 3}}),
        ("rewards", {"options": {"word": "rings"}}),
        ("rollout.guidance_scale", {"rollout": {"guidance_scale": 1.0}}),
        ("rollout.sampler", {"rollout": {"sampler": "entropy_informed"}}),
        ("prompts.heldout", {}),
    ],
)
def test_a_run_that_goes_on_with_another_evaluation_says_which_key_differs(key, change, tmp_path, capsys):
    began, now = tiny_run(tmp_path, tmp_path / "plain"), tiny_run(tmp_path, tmp_path / "plain", **change)
    prompts = PROMPTS[::-1] if key == "prompts.heldout" else PROMPTS
    requests = requests_for(PROMPTS, began.evaluation.images_per_prompt, began.evaluation.seed)
    benchmark = find_benchmark("geneval")
    before = conditions(began, benchmark, requests, began.evaluation.seed)
    write_result(tmp_path / "evaluation" / "before.json", replace(summarise(PROMPTS, GROUPS), conditions=before))
    assert read_result(tmp_path / "evaluation" / "before.json").conditions == before  # through JSON and back
    cluster: Any = None  # it is not asked
    for run, asked in ((began, PROMPTS), (now, prompts)):
        heldout = HeldOutEvaluation(cluster, run, asked, tmp_path, Progress())
        assert asyncio.run(heldout.evaluate("before", 2)).headline_value == summarise(PROMPTS, GROUPS).headline_value
    said = capsys.readouterr().out
    assert said.count("cannot be compared") == 1 and f"cannot be compared: {key} was" in " ".join(said.split())


def test_pictures_are_handed_over_batch_by_batch_where_they_are_wanted():
    requests = requests_for(PROMPTS, 4, seed=1)
    backend = EngineBackend(EvenSeeds(), [("eyes", Eyes())], images_per_batch=8)

    def look(group: JudgedGroup) -> list[bool]:
        return [group.verdict(i) == bool(group.images[i, 0, 0, 0]) for i in range(4)]

    sizes: list[int] = []
    judged = judge_in_batches(backend, requests, look, images=True, advance=sizes.append)
    assert asyncio.run(judged) == [[True] * 4] * 3 and sizes == [2, 1]
    without = asyncio.run(judge_in_batches(EngineBackend(EvenSeeds()), requests, lambda group: group))
    assert [(group.images, group.verdict(0)) for group in without] == [(None, None)] * 3


class BrightnessBenchmark(Benchmark):
    """A benchmark of a user's own, in one class."""

    name, headline, prompts, rewards, images_per_prompt = "brightness", "light", "prompts.txt", (), 1

    def aggregate(self, prompts: Sequence[Prompt], scored: Sequence[ScoredGroup]) -> dict[str, MetricValue]:
        return {"light": MetricValue(float(np.mean([group.scores for group in scored])))}


def test_a_benchmark_of_a_users_own_is_named_by_its_dotted_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "my_benchmarks", sys.modules[__name__])
    result = summarise_with(find_benchmark("my_benchmarks.BrightnessBenchmark"), PROMPTS, GROUPS)
    assert (result.benchmark, result.headline, result.headline_value) == ("brightness", "light", 0.5)
    with pytest.raises(
        ConfigError, match=r"evaluation.benchmark = .* no class that derives from stage_ray.evaluation.Benchmark"
    ):
        find_benchmark("my_benchmarks.Eyes")
    with pytest.raises(ConfigError, match=r"evaluation.benchmark = .* has no name and no headline"):
        find_benchmark("my_benchmarks.Benchmark")


def test_a_mistyped_benchmark_is_answered_with_the_nearest_one():
    assert find_benchmark("geneval").images_per_prompt == 4
    with pytest.raises(ConfigError, match="did you mean 'geneval'"):
        find_benchmark("genval")
