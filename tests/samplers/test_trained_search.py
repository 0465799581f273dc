"""Training through a search: candidates are drawn and scored, those that it keeps are trained on, and it is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stage_ray.cli import main
from stage_ray.config import RunConfig
from stage_ray.errors import ConfigError
from stage_ray.learner.learner import Learner
from stage_ray.records import RECORDED
from stage_ray.samplers import ImageSearch, load_search, training_search
from tests import learner_case
from tests.runs import lines, tiny_run
from tests.tiny import tiny_janus

BEST = {"search": "best_of", "search_options": {"candidates": 3, "biased": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_janus(tmp_path_factory.mktemp("model"))


def test_the_learner_trains_on_the_best_candidates_and_on_nothing_else(model: Path) -> None:
    plain, searching = (Learner(learner_case.tiny_run(model, rollout=rollout)) for rollout in ({}, BEST))
    groups = learner_case.sample_groups(plain.policy, learner_case.PROMPTS, 12)
    scored = learner_case.score(groups)
    best = []
    for group in groups:
        values = learner_case.low_tokens(group).reshape(4, 3)
        places = values.argmax(axis=1) + 3 * np.arange(4)
        arrays = {name: getattr(group, name)[places] for name in ("tokens", "images", *RECORDED)}
        best.append(dataclasses.replace(group, seeds=tuple(places.tolist()), **arrays))
    metrics, expected = searching.update(groups, scored), plain.update(best, learner_case.score(best))
    assert metrics["images"] == expected["images"] == 3 * 4
    means = [np.mean([learner_case.low_tokens(group).mean() for group in some]) for some in (best, groups)]
    assert metrics["search/gain"] == pytest.approx(means[0] - means[1]) and means[0] > means[1] + 0.05
    for (name, mine), (_, theirs) in zip(searching.weights(), plain.weights(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.slow
def test_a_run_draws_candidates_and_its_report_says_that_it_was_biased(plain: Path, tmp_path: Path, capsys) -> None:
    run = tiny_run(tmp_path, plain, steps=2, rollout=BEST, evaluation={"enabled": False})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
    assert "groups x 4 images = 8 images a step, each the best_of of 3 drawn" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    rows = lines(Path(run.run_dir) / "metrics.jsonl")
    assert [row["images"] for row in rows] == [8, 8] and all(row["search/gain"] > 0 for row in rows)
    assert rows[0]["mismatch/abs_logprob"] < 1e-3
    page = (Path(run.run_dir) / "report.html").read_text()
    assert "trained on images that best_of chose, which biases the update" in page


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"search": "best_of"},
            "'best_of' would train on images that a scorer chose, and their log-probabilities leave the choice out; "
            "set it to null here (.*), or accept the bias with rollout.search_options.biased=true",
        ),
        (
            {"search": "parm", "search_options": {"potential": {"type": "tests.scorers.Bright"}}},
            "'parm' asks more than the scores of candidates, .*; set it to best_of or null here",
        ),
        (
            {"search": "parm", "search_options": {"biased": True}},
            "biased = True is no option of search over images parm",
        ),
    ],
)
def test_other_searches_and_a_bias_that_was_not_accepted_are_refused(
    plain: Path, tmp_path: Path, options: dict[str, object], sentence: str
) -> None:
    run: RunConfig = tiny_run(tmp_path, plain, rollout=options)
    with pytest.raises(ConfigError, match=f"rollout.search.*{sentence}".replace("(.*)", r"\(.*\)")):
        training_search(run)
    if "biased" not in str(options):  # it searches all the same where nothing is trained
        assert isinstance(load_search(run.rollout, ["Brightness"]), ImageSearch)
