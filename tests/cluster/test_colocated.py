"""Colocated: each rollout worker lives beside a rank of the learner, and sleeps while that works."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.engines.torch import TorchEngine
from stage_ray.errors import ConfigError
from stage_ray.records import Prompt, RolloutRequest
from stage_ray.train import train
from tests.cluster.watched import Watched
from tests.runs import lines, tiny_run
from tests.test_async import QUICK, KillsWorker, sound
from tests.tiny import tiny_janus

ROLES = {
    "rollout": {"colocated": True, "workers": 2},
    "learner": {"ranks": 2},
    "pipeline": {"max_staleness": 0},
}


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_workers_sleep_during_every_update_and_come_back_with_the_learner_after_a_rank_dies(
    tmp_path, plain, monkeypatch
):
    calls = tmp_path / "calls"
    monkeypatch.setattr("stage_ray.cluster.placement.RolloutWorker", Watched)
    killer = KillsWorker("LearnerWorker", 3, signal.SIGKILL)
    run = tiny_run(tmp_path, plain, steps=5, **ROLES, **QUICK)
    directory = train(run, progress=killer).run_dir
    assert killer.killed == 2 and sound(directory).trained == 10
    assert [row["step"] for row in lines(directory / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    for worker in ("rollout-0", "rollout-1"):
        asked = [line.split()[1] for line in calls.read_text().splitlines() if line.split()[0] == worker]
        assert asked[:11] == ["setup", "sleep"] + ["generate", "sleep", "load"] * 3
        assert set(asked[11:]) <= {"generate", "sleep"}, "the batch that was on, or a learner that begins beside it"
    successors = {line.split()[0] for line in calls.read_text().splitlines()} - {"rollout-0", "rollout-1"}
    assert successors == {"rollout-0-restart-1", "rollout-1-restart-1"}


@pytest.mark.slow
def test_an_engine_that_slept_draws_what_it_drew(tmp_path):
    policy = PolicyConfig.model_validate({"path": str(tiny_janus(tmp_path / "janus"))})
    engine = TorchEngine(policy, RolloutConfig.model_validate({"dtype": "float32"}), worker="w")
    request = RolloutRequest(0, Prompt(0, "a photo of a red circle"), (1, 2, 3))
    (before,) = engine.generate([request])
    engine.sleep()
    engine.sleep()
    (after,) = engine.generate([request])
    assert np.array_equal(before.tokens, after.tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": {"max_staleness": 1}}, r"pipeline.max_staleness = 1 must be 0"),
        ({"learner": {"ranks": 1}}, r"rollout.workers = 2 must be 1"),
        ({"rollout": ROLES["rollout"] | {"max_workers": 3}}, r"rollout.max_workers = 3 must be 2"),
        ({"rollout": ROLES["rollout"] | {"gpus": 1}}, r"rollout.gpus = 1 and learner.gpus = 0 must add up to 1"),
        (
            {"rollout": ROLES["rollout"] | {"gpus": 0.5}, "learner": {"ranks": 2, "gpus": 1}},
            r"learner.gpus = 1 must add up",
        ),
    ],
)
def test_what_cannot_share_a_gpu_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, tmp_path / "janus", **{**ROLES, **changes})
