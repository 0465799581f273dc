"""Each worker has its share of the cores where it runs, whatever the driver's machine has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from stage_ray.workers import threads
from stage_ray.workers.threads import openmp_environment, own_threads
from tests.runs import tiny_run

NULL = {"threads": None}
EIGHT = {"workers": 8, "cpus": 1, **NULL}


@pytest.mark.parametrize(
    ("staleness", "rollout", "learner", "node", "expected"),
    [
        (0, NULL, NULL, {"CPU": 64}, (64, 64)),  # one of each takes turns with the other
        (1, NULL, NULL, {"CPU": 64}, (32, 32)),
        (1, EIGHT, {"ranks": 2, **NULL}, {"CPU": 64}, (4, 16)),
        (0, {**EIGHT, "cpus": 16}, NULL, {"CPU": 64}, (16, 64)),  # four have room there
        (0, {**EIGHT, "gpus": 1}, NULL, {"CPU": 64, "GPU": 2}, (32, 64)),
        (0, {**EIGHT, "resources": {"rollout": 0.1}}, NULL, {"CPU": 64, "rollout": 0.3}, (21, 64)),
        (0, {**NULL, "workers": 2, "max_workers": 4}, NULL, {"CPU": 64}, (16, 64)),
        (1, {**EIGHT, "workers": 100}, NULL, {"CPU": 200}, (1, 32)),
        (0, {**EIGHT, "threads": 5}, {"threads": 3}, {"CPU": 64}, (5, 3)),
    ],
)
def test_the_cores_are_divided_by_the_processes_that_may_share_them(
    tmp_path, monkeypatch, staleness, rollout, learner, node, expected
):
    nodes = [{"NodeID": "other", "Resources": {"CPU": 1.0}}, {"NodeID": "here", "Resources": node}]
    context = SimpleNamespace(get_node_id=lambda: "here")
    ray = SimpleNamespace(nodes=lambda: nodes, get_runtime_context=lambda: context)
    monkeypatch.setattr(threads, "ray", ray)
    monkeypatch.setattr(threads, "usable_cpus", lambda: 64)
    pipeline = {"max_staleness": staleness}
    run = tiny_run(tmp_path, tmp_path / "plain", rollout=rollout, learner=learner, pipeline=pipeline)
    assert (own_threads(run, run.rollout), own_threads(run, run.learner)) == expected


@pytest.mark.parametrize(
    ("staleness", "rollout", "learner", "asleep"),
    [
        (1, NULL, NULL, False),  # half of the cores each
        (1, {"threads": 64}, NULL, True),
        (1, {"threads": 60}, {"threads": 4}, False),
        (1, {"threads": 60}, {"threads": 5}, True),
        (1, {"workers": 4, "threads": 16}, {"threads": 1}, True),
        (0, {"threads": 64}, {"threads": 64}, False),  # in turns
        (0, {"workers": 2, "threads": 33}, NULL, True),
    ],
)
def test_threads_that_outnumber_the_cores_wait_asleep(tmp_path, monkeypatch, staleness, rollout, learner, asleep):
    nodes = [{"NodeID": "here", "Resources": {"CPU": 64.0}}]
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(threads, "ray", SimpleNamespace(nodes=lambda: nodes, get_runtime_context=lambda: context))
    monkeypatch.setattr(threads, "usable_cpus", lambda: 64)
    pipeline = {"max_staleness": staleness}
    run = tiny_run(tmp_path, tmp_path / "plain", rollout=rollout, learner=learner, pipeline=pipeline)
    for share in (run.rollout, run.learner):
        variables = openmp_environment(run, share)
        assert variables.pop("OMP_NUM_THREADS") == str(own_threads(run, share))
        assert variables == ({"OMP_WAIT_POLICY": "PASSIVE"} if asleep else {})
