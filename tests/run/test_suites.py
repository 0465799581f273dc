"""Several benchmarks of one run, over a stand-in whose pictures are as good as the test says; and one real run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage_ray.config import RunConfig
from stage_ray.config.load import validate_config
from stage_ray.errors import ConfigError
from stage_ray.evaluation import Benchmark, MetricValue, mean_over_images
from stage_ray.evaluation.suites import is_rewarded, resolve_suites
from stage_ray.observability.progress import Progress
from stage_ray.records import GroupRefs, Prompt, ScoredGroup
from stage_ray.run.preflight import RunPrompts
from stage_ray.run.suites import SuiteEvaluations
from stage_ray.train import train
from tests.runs import PROMPTS, lines, tiny_run

NAMES = [Prompt(i, text) for i, text in enumerate(PROMPTS)]
BRIGHT = {"benchmark": "tests.run.test_suites.LightBenchmark", "prompts": "prompts.txt"}


class LightBenchmark(Benchmark):
    """Mean of all scores, by scorers of its own."""

    name, headline, prompts, images_per_prompt = "light", "mean light", "prompts.txt", 2
    rewards: Sequence[Any] = ()

    def aggregate(self, prompts: Sequence[Prompt], scored: Sequence[ScoredGroup]) -> dict[str, MetricValue]:
        values = {prompt.index: group.scores[:, 0].tolist() for prompt, group in zip(prompts, scored, strict=True)}
        mean = mean_over_images(values)
        return {self.headline: mean} if mean else {}


class Lamp:
    """A cluster whose every picture has the brightness of its suite."""

    def __init__(self) -> None:
        self.light: dict[str | None, float] = {}

    async def generate(self, requests: Sequence[Any]) -> list[GroupRefs]:
        return [GroupRefs(request.group_id, 0, request, "images") for request in requests]

    async def score(self, groups: Sequence[GroupRefs], suite: str | None = None) -> list[GroupRefs]:
        def scored(group: GroupRefs) -> ScoredGroup:
            count = len(group.tokens.seeds)
            scores = np.full((count, 1), self.light.get(suite, 0.5) + group.group_id / 100, np.float32)
            return ScoredGroup(group.group_id, ("light",), scores, scores > 0, ({},) * count, 0.0)

        return [replace(group, scores=(scored(group),)) for group in groups]

    async def fetch(self, refs: Sequence[Any]) -> list[Any]:
        return [np.zeros((1, 8, 8, 3), np.uint8) if ref == "images" else ref for ref in refs]


def suites_run(directory: Path, **evaluation: Any) -> RunConfig:
    """Evaluated every two of six steps by "own", which the run is trained on, and "dark", which it is not."""
    mine = BRIGHT | {"name": "dark", "rewards": [{"type": "tests.scorers.Bright"}]}
    config = {"benchmark": BRIGHT["benchmark"], "suites": [mine], "every": 2, **evaluation}
    run = tiny_run(directory, directory / "plain", steps=6, checkpoint={"keep_best": "dark"}, evaluation=config)
    return resolve_suites(run)


def evaluations(run: RunConfig, lamp: Lamp) -> SuiteEvaluations:
    cluster: Any = lamp
    return SuiteEvaluations(cluster, run, RunPrompts(NAMES, NAMES, {"dark": NAMES}), Path(run.run_dir), Progress())


def write_rewards(run: RunConfig, rewards: Sequence[float]) -> None:
    rows = [json.dumps({"step": step, "reward/mean": reward}) + "\n" for step, reward in enumerate(rewards, 1)]
    Path(run.run_dir, "metrics.jsonl").write_text("".join(rows))


async def up_to(suites: SuiteEvaluations, run: RunConfig, lamp: Lamp, light: dict[int, float], start: int = 0) -> Any:
    """Evaluate as a run does, with the pictures of "dark" as bright as ``light`` says; what the last step gave."""
    lamp.light["dark"] = light.get(start, 0.5)
    await suites.before(start)
    said: Any = None
    for step in range(start + 1, max(light) + 1):
        lamp.light["dark"] = light.get(step, 0.0)
        write_rewards(run, [0.1 * i for i in range(step)])
        said = await suites.during(step, 0.1 * step)
    return said


def test_each_suite_is_evaluated_before_between_and_after_with_its_own_scorers(tmp_path):
    run, lamp = suites_run(tmp_path), Lamp()
    suites = evaluations(run, lamp)
    (tmp_path / "run").mkdir()
    metrics, _ = asyncio.run(up_to(suites, run, lamp, {0: 0.1, 2: 0.2, 4: 0.3, 6: 0.25}))
    assert metrics == {"eval/light/mean light": pytest.approx(0.515), "eval/dark/mean light": pytest.approx(0.265)}
    found = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*.json"))
    times = ("after", "before", "step-000002", "step-000004")
    assert found == [f"evaluation/{name}.json" for name in ("after", "before")] + [
        f"evaluation/dark/{name}.json" for name in times
    ] + [f"evaluation/{name}.json" for name in times[2:]]
    assert asyncio.run(suites.during(5, 0.5)) == ({}, []), "none is due"
    lamp.light["dark"] = 9.0
    assert asyncio.run(suites.after()) == pytest.approx(0.515), "the last step was evaluated already"
    assert suites.scores()[6] == pytest.approx(0.265)


def test_a_suite_keeps_what_its_search_chooses_of_more_images(tmp_path):
    mine = BRIGHT | {"name": "dark", "rewards": [{"type": "tests.scorers.Bright"}], "search": "best_of"}
    run, lamp = suites_run(tmp_path, suites=[mine]), Lamp()
    suites = evaluations(run, lamp)
    asyncio.run(suites.before(0))
    own, dark = (json.loads((tmp_path / "run/evaluation" / f"{at}before.json").read_text()) for at in ("", "dark/"))
    assert len(own["images"]) == len(dark["images"]) == 2 * len(NAMES)
    assert dark["images"][0]["details"]["search"]["candidates"] == 4 and "search" not in own["images"][0]["details"]
    assert dark["conditions"]["rollout.search_options"] == {"candidates": 4, "scorer": None, "biased": False}
    assert "rollout.search" not in own["conditions"]


def test_a_run_that_goes_on_knows_what_was_best_before_and_forgets_what_it_trains_again(tmp_path):
    run, lamp = suites_run(tmp_path), Lamp()
    (tmp_path / "run").mkdir()
    asyncio.run(up_to(evaluations(run, lamp), run, lamp, {0: 0.1, 2: 0.4, 4: 0.3}))
    suites = evaluations(run, lamp)
    asyncio.run(suites.before(3))
    assert suites.scores() == {0: pytest.approx(0.115), 2: pytest.approx(0.415)}


def test_an_alarm_rings_when_the_reward_rises_while_a_suite_that_is_not_rewarded_falls(tmp_path):
    run, lamp = suites_run(tmp_path), Lamp()
    (tmp_path / "run").mkdir()
    _, alarms = asyncio.run(up_to(evaluations(run, lamp), run, lamp, {0: 0.4, 2: 0.5, 4: 0.3}))
    ((name, text),) = alarms
    assert name == "overoptimization"
    assert "mean light of suite dark fell by 0.2" in text and "since step 2" in text and "0.2 to 0.4" in text
    _, alarms = asyncio.run(up_to(evaluations(run, lamp), run, lamp, {0: 0.4, 2: 0.5, 4: 0.6}))
    assert alarms == []
    rewarded = validate_config(run.model_dump() | {"rewards": [{"type": "tests.scorers.Bright"}]})
    _, alarms = asyncio.run(up_to(evaluations(rewarded, lamp), rewarded, lamp, {0: 0.4, 2: 0.5, 4: 0.3}))
    assert alarms == []


def test_suites_that_are_switched_off_are_not_evaluated(tmp_path):
    run = tiny_run(tmp_path, tmp_path / "plain", evaluation={"suites": [BRIGHT], "enabled": False})
    cluster: Any = None  # it is not asked
    suites = SuiteEvaluations(cluster, resolve_suites(run), RunPrompts(NAMES, NAMES, {}), tmp_path, Progress())
    assert [asyncio.run(suites.before(0)), asyncio.run(suites.after())] == [None, None]


def test_a_suite_is_rewarded_where_the_run_trains_on_what_judges_it(tmp_path):
    run = suites_run(tmp_path)
    (dark,) = run.evaluation.suites
    watched = [{"type": "tests.scorers.Brightness"}, {"type": "tests.scorers.Bright", "weight": 0}]
    for rewards, rewarded in (([watched[0]], False), (watched, False), ([watched[1] | {"weight": 1}], True)):
        assert is_rewarded(validate_config(run.model_dump() | {"rewards": rewards}), dark) == rewarded


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"suites": ["genval"]}, r"evaluation.suites.0.benchmark = 'genval' is no known benchmark; did you mean"),
        ({"suites": [BRIGHT]}, "evaluation.suites: 'light' and 'light' would share one name"),
        ({"suites": [BRIGHT | {"name": "drak"}]}, "keep_best = 'dark' is no suite of this run; did you mean 'drak'"),
        ({"suites": [BRIGHT | {"name": "../dark"}]}, "evaluation.suites.0.name = '../dark'"),
        ({"suites": [BRIGHT | {"rewards": [{"type": "clip"}] * 2}]}, "suites.0.rewards: the name 'clip' is used twice"),
        ({"every": None}, "checkpoint.keep_best = 'dark' needs evaluation.every"),
        ({"enabled": False}, "evaluation.every = 2 needs evaluation.enabled = true"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_its_key(changes, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        suites_run(tmp_path, **changes)


def test_a_named_benchmark_needs_one_of_its_judges_among_the_scorers(tmp_path):
    def resolve(benchmark: str, *scorers: str) -> RunConfig:
        run = tiny_run(tmp_path, tmp_path / "plain", evaluation={"benchmark": benchmark})
        return resolve_suites(validate_config(run.model_dump() | {"rewards": [{"type": scorer} for scorer in scorers]}))

    with pytest.raises(ConfigError, match="evaluation.benchmark = .dpg. is judged by vlm_questions, none of the re"):
        resolve("dpg", "clip")
    for benchmark, *scorers in [("dpg", "clip", "vlm_questions"), ("dpg", "tests.scorers.Bright"), ("geneval", "clip")]:
        assert resolve(benchmark, *scorers).evaluation.benchmark == benchmark


def test_a_suites_name_alone_stands_for_it_with_all_that_its_benchmark_brings(tmp_path):
    run = resolve_suites(tiny_run(tmp_path, tmp_path / "plain", evaluation={"suites": [BRIGHT["benchmark"]]}))
    (suite,) = run.evaluation.suites
    assert (suite.name, suite.prompts, suite.images_per_prompt) == ("light", "prompts.txt", 2)
    assert suite.rewards == run.rewards, "it has no scorers of its own"


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_a_run_keeps_exports_and_reports_its_best_step(tmp_path, plain):
    prompts = str(tmp_path / "prompts.txt")
    suite = BRIGHT | {"name": "dark", "prompts": prompts, "rewards": [{"type": "tests.scorers.Bright"}]}
    config = {"benchmark": BRIGHT["benchmark"], "every": 1, "suites": [suite]}
    checkpoint = {"every": 4, "keep": 1, "keep_best": "dark"}
    summary = train(tiny_run(tmp_path, plain, evaluation=config, checkpoint=checkpoint, learner={"lr": 1e-2}))
    rows = lines(summary.run_dir / "metrics.jsonl")
    curve = {row["step"]: row["eval/dark/mean light"] for row in rows}
    assert len(curve) == 4 and summary.best == max(curve, key=curve.__getitem__)
    kept = sorted(int(path.name.removeprefix("step-")) for path in (summary.run_dir / "checkpoints").glob("step-*"))
    assert kept == sorted({summary.best, 4})
    assert json.loads((summary.run_dir / "best.json").read_text())["step"] == summary.best
    same = [(summary.run_dir / name / "model.safetensors").read_bytes() for name in ("best", "final")]
    assert (same[0] == same[1]) == (summary.best == 4)
    page = summary.report.read_text()
    assert f"<b>step {summary.best}</b>" in page and "Suite dark, every metric" in page
    assert page.count("± one standard error</figcaption>") == 2
