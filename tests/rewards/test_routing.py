"""`rewards[].when`: a scorer is asked about the prompts that it names; elsewhere it neither failed nor counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stage_ray.algorithm import combine_rewards
from stage_ray.cli import main
from stage_ray.config import RewardConfig
from stage_ray.config.load import validate_config
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import find_benchmark, summarise
from stage_ray.evaluation.partial import PartialResult
from stage_ray.learner.learner import Learner
from stage_ray.recipes import load_recipe
from stage_ray.records import Prompt, ScoredGroup
from stage_ray.rewards import build_rewards, check_rewards, merge_scores, score_groups
from stage_ray.rewards.base import RewardOutput
from stage_ray.run.preflight import preflight
from stage_ray.train import train
from stage_ray.workers.group_files import group_file, load_group, save_group
from stage_ray.workers.reward import is_silent, score_error
from tests.learner_case import PROMPTS, sample_groups
from tests.learner_case import tiny_run as learner_run
from tests.rewards.test_scoring import group
from tests.runs import StopsAfter, lines, tiny_run

HERE = "tests.rewards.test_routing"
SPATIAL, COLOR = {"task_type": "spatial"}, {"task_type": "color"}


class Pixel:
    """The first pixel, with features; it notes the prompts that it was asked about, and refuses a word."""

    asked: list[str] = []  # noqa: RUF012  of all instances

    @classmethod
    def check(cls, prompts):
        return [(prompt, "it is dark") for prompt in prompts if "dark" in prompt.text]

    def score(self, images, prompts):
        self.asked += [prompt.text for prompt in prompts]
        scores = images[:, 0, 0, 0].astype(np.float32)
        verdicts = tuple({"verdict": bool(score > 35)} for score in scores)
        return RewardOutput(scores, scores != 51, verdicts, np.stack([scores, scores], axis=1))


def routed(**more) -> list[RewardConfig]:
    """Of spatial prompts one scorer, of the others another with twice the weight, and a third of all."""
    one = {"type": f"{HERE}.Pixel"}
    configs = [
        {**one, "name": "place", "when": SPATIAL},
        {**one, "name": "rest", "when": {"task_type": ["color", "shape"]}, "weight": 2, **more},
        {"type": "win_rate", "options": {"scorer": f"{HERE}.Pixel"}},
    ]
    return [RewardConfig.model_validate(config) for config in configs]


def some_groups():
    """Two groups of three images: of a spatial prompt, and of one about colours."""
    records = {1: SPATIAL, 5: COLOR}
    return [replace(g, prompt=replace(g.prompt, record=records[g.group_id])) for g in (group(1, 3), group(5, 3))]


def test_a_scorer_is_asked_about_groups_whose_prompt_matches_and_is_neither_failed_nor_silent_about_others():
    Pixel.asked.clear()
    spatial, color = score_groups(build_rewards(routed()[:2]), some_groups())
    assert Pixel.asked == ["prompt 1"] * 3 + ["prompt 5"] * 3
    assert spatial.names == color.names == ("place", "rest")
    assert (spatial.unasked, color.unasked) == (("rest",), ("place",))
    assert spatial.scores[:, 0].tolist() == [10, 11, 12] and np.isnan(spatial.scores[:, 1]).all()
    assert spatial.valid.tolist() == [[True, False]] * 3 and spatial.details[0] == {
        "place": {"verdict": False},
        "rest": {},
    }
    assert spatial.features.keys() == {"place"} and np.isfinite(spatial.features["place"]).all()
    assert score_error(spatial) == "" and not is_silent(spatial, [1, 2]) and is_silent(spatial, [0, 2])
    assert score_error(color) == "rest: 1 of 3 scores failed (the scorer calls it invalid)", "a failure stays one"


def test_pools_of_their_own_give_what_one_pool_gives_and_a_win_rate_may_be_routed():
    configs = [*routed()[:2], routed()[2].model_copy(update={"when": SPATIAL})]
    whole = score_groups(build_rewards(configs), some_groups())
    parts = [score_groups(build_rewards([config]), some_groups()) for config in configs[::-1]]
    for one, *its in zip(whole, *parts, strict=True):
        merged = merge_scores(its, [config.column for config in configs])
        assert merged.names == one.names and merged.unasked == one.unasked and merged.details == one.details
        np.testing.assert_array_equal(merged.scores, one.scores)
    assert whole[0].scores[:, 2].tolist() == [0, 0.5, 1] and whole[1].unasked == ("place", "win_rate")
    assert is_silent(parts[0][1], [1.0]), "a pool that was asked nothing tells nothing apart"


def test_a_score_that_was_not_asked_for_comes_back_from_disk_as_such(tmp_path: Path):
    first, second = score_groups(build_rewards(routed()[:2]), some_groups())
    save_group(tmp_path, some_groups()[0], first)
    _, loaded = load_group(group_file(tmp_path, 1))
    assert loaded.unasked == ("rest",) and loaded.asked.tolist() == [True, False]
    partial = PartialResult(tmp_path / "partial")
    partial.add(first)
    partial.add(second)  # one of its scores failed
    again = PartialResult(tmp_path / "partial").groups
    assert again.keys() == {1} and again[1].unasked == ("rest",)
    np.testing.assert_array_equal(again[1].scores, first.scores)
    np.testing.assert_array_equal(again[1].valid, first.valid)


def test_an_evaluation_counts_the_scores_that_were_asked_for():
    groups = [replace(g, group_id=i) for i, g in enumerate(score_groups(build_rewards(routed()[:2]), some_groups()))]
    prompts = [Prompt(i, g.prompt.text, {"tag": f"task {i}"}) for i, g in enumerate(some_groups())]
    result = summarise(find_benchmark("geneval"), prompts, groups)
    assert result.scores == {"place": 11, "rest": 51} and result.metrics["task 1"].value == 1
    assert result.images[0]["scores"] == {"place": 10} and result.images[4]["scores"] == {"rest": None}


def test_checks_see_the_prompts_that_a_scorer_is_asked_about_and_one_without_any_scorer_is_named():
    prompts = [Prompt(0, "a dark cat", SPATIAL), Prompt(1, "a dark dog", {"task_type": "numeracy"})]
    found = check_rewards(routed()[:2], prompts)
    assert found[0] == (prompts[0], "place: it is dark")
    assert (
        found[1][0] == prompts[1] and "no scorer is asked about it: place when {'task_type': 'spatial'}" in found[1][1]
    )
    assert check_rewards([RewardConfig(type=f"{HERE}.Pixel", when={"n": [1, 2]})], [Prompt(0, "x", {"n": "2"})]) == []


def write_prompts(path: Path, *kinds: str) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    records = [{"prompt": f"a photo of a red {kind}", "task_type": kind} for kind in kinds]
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


BRIGHT = {"type": "tests.scorers.Brightness", "name": "light", "when": SPATIAL}
DARK = {"type": "tests.scorers.Brightness", "name": "dark", "weight": -1, "when": COLOR, "workers": 1}


@pytest.mark.parametrize(
    ("kinds", "when", "complaint"),
    [
        (
            ("spatial", "shape"),
            SPATIAL,
            r"1 of 4 prompts cannot be scored: .*prompts.jsonl, line 2: no scorer is asked",
        ),
        (
            ("spatial",),
            {"task": "spatial"},
            r"rewards.0.when = .* matches none of 3 prompts, whose keys are prompt, task",
        ),
    ],
)
def test_a_prompt_without_a_scorer_and_a_route_without_a_prompt_are_refused_before_the_start(
    tmp_path: Path, plain: Path, kinds: tuple[str, ...], when: dict, complaint: str
):
    prompts = write_prompts(tmp_path / "prompts.jsonl", *kinds)
    heldout = write_prompts(tmp_path / "heldout.jsonl", "spatial", "color")
    rewards = [{**BRIGHT, "when": when}, DARK]
    with pytest.raises(ConfigError, match=complaint):
        preflight(tiny_run(tmp_path / "run", plain, rewards=rewards, prompts={"train": prompts, "heldout": heldout}))


def test_a_recipe_that_needs_every_score_refuses_a_route_and_another_way_to_combine(tmp_path: Path, plain: Path):
    def load(**changes):
        return load_recipe(tiny_run(tmp_path, plain, rewards=[BRIGHT, DARK], **changes))

    with pytest.raises(ConfigError, match="algorithm.features = 'light': its `when` leaves groups without features"):
        load(recipe="diverse_grpo", algorithm={"features": "light"})
    with pytest.raises(ConfigError, match="algorithm.combine = 'zscore': recipe synergy mixes scorers in its own way"):
        load(recipe="synergy", algorithm={"combine": "zscore"})
    with pytest.raises(ConfigError, match="combine = 'z'"):
        validate_config({**tiny_run(tmp_path, plain).model_dump(), "algorithm": {"combine": "z"}})


def test_zscores_are_taken_inside_the_group_and_a_constant_scorer_is_zero():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 4, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1000.0])
    scores[1, :, 0] = 0.1  # its mean rounds
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for n in range(3):
        for r in range(2):
            column = scores[n, :, r]
            if (n, r) != (1, 0):
                expected[n] += weights[r] * (column - column.mean()) / (column.std() + 1e-8)
    for drop in (False, True):
        torch.testing.assert_close(combine_rewards(scores, weights=weights, drop_constant=drop, zscore=True), expected)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("recipe", ["stage", "grpo"])
@pytest.mark.parametrize("combine", ["sum", "zscore"])
def test_an_update_is_that_of_the_scorers_that_were_asked_and_metrics_are_their_means(
    recipe: str, combine: str, model: Path
):
    """A routed scorer, against one that gives a constant 0 elsewhere, as GIT does for spatial prompts."""
    rewards = [{"type": "tests.scorers.Brightness", "name": name} for name in ("hps", "git")]
    run = learner_run(model, rewards=rewards, recipe=recipe, algorithm={"combine": combine})
    learner = Learner(run)
    groups = sample_groups(learner.policy, PROMPTS[:2], 4)
    rng = np.random.default_rng(0)
    all_scores = [rng.random((4, 2)).astype(np.float32) for _ in groups]
    all_scores[0][:, 1] = 0
    zero = [ScoredGroup(g.group_id, ("hps", "git"), s, np.ones((4, 2), bool), ({},) * 4, 0.0)
            for g, s in zip(groups, all_scores, strict=True)]  # fmt: skip
    missing = np.array([[True, False]] * 4)
    unasked = [
        replace(zero[0], scores=np.where(missing, all_scores[0], np.nan), valid=missing, unasked=("git",)),
        zero[1],
    ]
    with_zero, routed = Learner(run).update(groups, zero), learner.update(groups, unasked)
    assert routed["reward/git"] == pytest.approx(all_scores[1][:, 1].mean()) != with_zero["reward/git"]
    assert (routed["reward/informative"], with_zero["reward/informative"]) == (1.0, 0.75)
    for name in ("loss", "grad_norm", "advantage/mean_abs", "reward/mean", "reward/hps"):
        assert routed[name] == with_zero[name], name


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_a_run_with_two_routed_scorers_is_recorded_resumed_and_replayed(tmp_path: Path, plain: Path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", "spatial", "color", "color")
    changes = {
        "rewards": [BRIGHT, DARK],
        "prompts": {"train": prompts, "heldout": prompts},
        "pipeline": {"record": True, "max_staleness": 1},
        "evaluation": {"sample_every": 1000},
    }
    run = tiny_run(tmp_path, plain, **changes)
    with pytest.raises(KeyboardInterrupt):
        train(run, progress=StopsAfter(3))  # a step after its checkpoint
    whole = train(run, resume=True).run_dir
    rows = lines(whole / "metrics.jsonl")
    assert all({"reward/light", "reward/dark"} & row.keys() for row in rows) and not any(row["alarms"] for row in rows)
    for path in (whole / "groups").rglob("*.safetensors"):
        recorded, scored = load_group(path)
        assert scored.names == ("light", "dark")
        assert scored.unasked == (
            ("dark",) if recorded.prompt.record == {**recorded.prompt.record, **SPATIAL} else ("light",)
        )
    result = json.loads((whole / "evaluation" / "after.json").read_text())
    assert [list(image["scores"]) for image in result["images"]] == [["light"]] * 2 + [["dark"]] * 4
    again = str(tmp_path / "replayed")
    config = str(whole / "config.yaml")
    assert main(["train", config, "--run-dir", again, "--replay", str(whole)]) == 0
    for row, straight in zip(rows, lines(Path(again) / "metrics.jsonl"), strict=True):
        found = {name: row[name] for name in straight if name.startswith(("loss", "grad_norm", "reward/"))}
        assert {"loss", "grad_norm", "reward/mean"} <= found.keys()
        assert found == {name: straight[name] for name in found}
