"""Each alarm is met the way a user meets it: by a real update of a real model, or by a real run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from stage_ray.config import RunConfig
from stage_ray.learner.batch import LearnerError
from stage_ray.learner.learner import Learner
from stage_ray.observability.alarms import alarms
from stage_ray.observability.progress import Progress
from stage_ray.records import RolloutGroup
from stage_ray.run.recording import StepRecorder
from stage_ray.train import train
from tests import runs
from tests.learner_case import PROMPTS, low_tokens, sample_groups, score, tiny_run

NO_ENTROPY_REWARD = {"entropy_reward": 0.0}


def constant(group: RolloutGroup) -> np.ndarray:
    return np.ones(len(group.tokens))


def updates(run: RunConfig, *rewards) -> list[dict[str, str]]:
    """The alarms of updates on fresh groups, one a reward: name -> text."""
    learner = Learner(run, threads=1)
    found = []
    for reward in rewards:
        groups = sample_groups(learner.policy, PROMPTS, 4, version=learner.version, seed=learner.version)
        found.append(dict(alarms(learner.update(groups, score(groups, reward)))))
    return found


def test_healthy_updates_raise_no_alarm(model):
    assert updates(tiny_run(model, learner={"lr": 1e-4}), low_tokens, low_tokens) == [{}, {}]


def test_a_scorer_that_gives_every_image_the_same_leaves_no_gradient(model):
    (found,) = updates(tiny_run(model, algorithm=NO_ENTROPY_REWARD), constant)
    assert "changed nothing" in found["zero_gradient"]
    assert "every group" in found["no_variance"]
    assert "nothing steers" in found["no_valid_reward"]


def test_a_policy_that_has_moved_away_still_has_the_gradient_of_the_kl(model):
    _, found = updates(tiny_run(model, algorithm=NO_ENTROPY_REWARD), low_tokens, constant)
    assert found.keys() == {"no_variance", "no_valid_reward"}


def test_with_the_entropy_reward_a_useless_scorer_does_not_hide_behind_it(model):
    _, found = updates(tiny_run(model), low_tokens, constant)
    assert found.keys() == {"no_valid_reward"}
    assert "entropy reward alone steers" in found["no_valid_reward"]


def test_a_learning_rate_far_too_high_blows_the_kl_up_and_then_collapses_the_entropy(model):
    run = tiny_run(model, learner={"lr": 3e-2}, algorithm={"beta": 0.0, **NO_ENTROPY_REWARD})
    first, second, _, fourth = updates(run, *[low_tokens] * 4)
    assert first == {} and second.keys() == {"kl_blowup"}
    assert "raise algorithm.beta" in fourth["kl_blowup"] and "raise algorithm.beta" in fourth["entropy_collapse"]


def served_old_weights(model: Path, lr: float) -> dict[str, str]:
    """The alarms when an engine says it serves version 1 but draws with version 0."""
    run = tiny_run(model, learner={"lr": lr, "schedule": "constant"})
    learner, engine = Learner(run, threads=1), Learner(run, threads=1)
    groups = sample_groups(engine.policy, PROMPTS, 4, version=0)
    learner.update(groups, score(groups))
    groups = sample_groups(engine.policy, PROMPTS, 4, version=1, seed=1)
    return dict(alarms(learner.update(groups, score(groups))))


def test_an_engine_that_serves_other_weights_than_it_says_is_found_out(model):
    assert "rollout and learner differ by 0." in served_old_weights(model, lr=1e-3)["mismatch"]


def test_a_synchronous_run_stops_where_the_mismatch_is_beyond_its_bound(model):
    with pytest.raises(LearnerError, match="does the engine hold other weights"):
        served_old_weights(model, lr=3e-3)


@pytest.mark.parametrize("true_weights", [True, False])
def test_an_asynchronous_run_with_nothing_but_older_groups_finds_it_out_too(model, true_weights):
    run = tiny_run(model, learner={"lr": 1e-4}, pipeline={"max_staleness": 1})
    learner, engine = Learner(run, threads=1), Learner(run, threads=1)
    if not true_weights:
        with torch.no_grad():
            for parameter in engine.policy.trained_parameters().values():
                parameter.mul_(1.1)
    first, second = (sample_groups(engine.policy, PROMPTS, 4, version=0, seed=seed) for seed in (0, 1))
    learner.update(first, score(first))
    metrics = learner.update(second, score(second))
    assert metrics["staleness/1"] == 1 and "mismatch/abs_logprob" not in metrics
    found = dict(alarms(metrics))
    assert found == {} if true_weights else "older groups differ by 0." in found["mismatch"]


def test_what_was_not_measured_raises_no_alarm(model):
    assert alarms({}) == []


def test_an_alarm_that_goes_on_is_recorded_every_step_and_shown_when_it_begins(tmp_path, plain):
    run, said = runs.tiny_run(tmp_path, plain), io.StringIO()
    recorder = StepRecorder(run, tmp_path, 5, Progress(Console(file=said, width=200)))
    for step, kl in enumerate((0.6, 0.7, 0.1, 0.8, 0.9), 1):
        recorder.step(step, {"kl": kl})
    recorder.close()
    assert [alarm["step"] for alarm in runs.lines(tmp_path / "alarms.jsonl")] == [1, 2, 4, 5]
    assert [f"KL to the reference is {kl}" in said.getvalue() for kl in (0.6, 0.7, 0.8, 0.9)] == [1, 0, 1, 0]


def run_and_listen(run: RunConfig) -> tuple[str, list[dict], str]:
    """What a run said, its alarms.jsonl and its report."""
    said = io.StringIO()
    directory = Path(run.run_dir)
    train(run, progress=Progress(Console(file=said, width=200)))
    return said.getvalue(), runs.lines(directory / "alarms.jsonl"), (directory / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_silent_groups_are_redrawn_and_their_alarm_is_in_the_log_the_metrics_and_the_report(tmp_path, plain):
    algorithm = NO_ENTROPY_REWARD | {"redraw_silent": 1}
    changes = {"algorithm": algorithm, "rewards": [{"type": "tests.scorers.Constant"}]}
    run = runs.tiny_run(tmp_path, plain, steps=1, evaluation={"enabled": False}, **changes)
    said, written, report = run_and_listen(run)
    names = ["zero_gradient", "no_variance", "no_valid_reward"]
    (row,) = (json.loads(line) for line in (Path(run.run_dir) / "metrics.jsonl").read_text().splitlines())
    assert row["alarms"] == names == [alarm["alarm"] for alarm in written]
    events = runs.lines(Path(run.run_dir) / "ledger.jsonl")
    dropped = [event["why"] for event in events if event["event"] == "dropped"]
    assert set(dropped) == {"no scorer told its images apart"} and row["rollout/redrawn"] == len(dropped) >= 2
    assert sum(event["event"] == "trained" for event in events) == 2, "those that stay silent are trained"
    for name in names:
        assert f"ALARM {name}" in said and f">{name}<" in report
