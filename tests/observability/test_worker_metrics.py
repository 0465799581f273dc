"""What the actors of a run report through Ray is on the node's metrics endpoint, as the metric registry names it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from stage_ray.cluster.placement import actor_of
from stage_ray.cluster.runtime import start_ray
from stage_ray.observability.registry import WORKER
from stage_ray.records import Prompt, RolloutRequest, image_seeds
from stage_ray.workers.learner import LearnerWorker
from stage_ray.workers.reward import RewardWorker
from stage_ray.workers.rollout import RolloutWorker
from tests.plain import IMAGE_TOKENS, plain_checkpoint
from tests.runs import PROMPTS, tiny_run

ON_A_GPU = "ray_stage_ray_worker_peak_gpu_memory_bytes"
RANKS = ["learner-9-rank-0", "learner-9-rank-1"]
WORKERS = {
    "rollout": ["rollout-9"],
    "reward": ["reward-9"],
    "learner": RANKS,
}  # names that no test uses in this process
Series = dict[tuple[str, str, str], float]


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Series:
    """(metric, role, worker) -> value, after two groups of four were drawn, scored and trained by two ranks."""
    directory = tmp_path_factory.mktemp("run")
    run = tiny_run(
        directory, plain_checkpoint(directory / "plain"), evaluation={"enabled": False}, learner={"ranks": 2}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        start_ray(run, directory / "run")
        try:
            return scrape(draw_score_train(run, directory))
        finally:
            ray.shutdown()


def draw_score_train(run: Any, directory: Path) -> list[Any]:
    rollout = actor_of(RolloutWorker, 0.5, 0, {}).remote("rollout-9", run, str(directory / "rollout.log"))
    reward = actor_of(RewardWorker, 0.5, 0, {}).remote("reward-9", run, str(directory / "reward.log"))
    ranks = [
        actor_of(LearnerWorker, 0.25, 0, {}).remote(name, run, str(directory / f"{name}.log"), rank)
        for rank, name in enumerate(RANKS)
    ]
    workers = [rollout, reward, *ranks]
    for pid, _ in ray.get([worker.ping.remote() for worker in workers]):
        assert psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] == "", "without a GPU of its own it sees none"
    address = ray.get(ranks[0].address.remote())
    ray.get([rank.setup.remote(address) for rank in ranks] + [worker.setup.remote() for worker in (rollout, reward)])
    requests = [RolloutRequest(i, Prompt(i, PROMPTS[i]), image_seeds(20, i, 4)) for i in range(2)]
    _, *drawn = rollout.generate.options(num_returns=3).remote(*requests)
    _, *pictures = rollout.decode.options(num_returns=3).remote(*drawn)
    _, *scored = reward.score.options(num_returns=3).remote(drawn[0], pictures[0], drawn[1], pictures[1])
    ray.get([rank.set_batch.remote(drawn[0], scored[0], drawn[1], scored[1]) for rank in ranks])
    ray.get([rank.update.remote() for rank in ranks])
    return workers


def scrape(held: list[Any]) -> Series:
    """What the endpoint says once all workers are on it and nothing new has come for a while.

    ``held``: the workers: Ray ends those without a handle.
    """
    names = {name for workers in WORKERS.values() for name in workers}
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, grown = time.monotonic() + 60, time.monotonic()
    series: Series = {}
    while time.monotonic() < deadline:
        if {worker for _, _, worker in series} == names and time.monotonic() - grown > 5:
            break
        known = len(series)
        time.sleep(0.5)
        try:
            text = urllib.request.urlopen(address, timeout=10).read().decode()
        except OSError:  # the agent is not up yet, or busy
            continue
        for name, labels, value in re.findall(r"^(ray_stage_ray\w+)\{(.*)\} (\S+)$", text, flags=re.MULTILINE):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if tags["worker"] in names:
                series[name, tags["role"], tags["worker"]] = float(value)
        grown = time.monotonic() if len(series) > known else grown
    return series


@pytest.mark.slow
def test_every_worker_reports_every_metric_of_the_registry_and_no_other(reported):
    names = {metric.prometheus for metric in WORKER} - {ON_A_GPU}
    workers = [(role, worker) for role, names in WORKERS.items() for worker in names]
    without_version = {("ray_stage_ray_worker_policy_version", "reward", "reward-9")}
    wanted = {(name, role, worker) for name in names for role, worker in workers} - without_version
    assert {key for key in reported if key[0] != ON_A_GPU} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("role, workers", WORKERS.items())
def test_the_counts_of_a_role_are_those_of_the_work_done(reported, role, workers):
    def of(name: str) -> float:
        return sum(reported[f"ray_stage_ray_worker_{name}", role, worker] for worker in workers)

    assert (of("calls_total"), of("groups_total"), of("images_total")) == (len(workers), 2, 8)
    assert of("tokens_total") == 8 * IMAGE_TOKENS
    assert 0 < of("busy_seconds_total") < 60
    speed = of("tokens_total") / of("busy_seconds_total") * len(workers)
    assert of("tokens_per_second") == pytest.approx(speed, rel=0.1)
    assert 50 * 2**20 < of("peak_memory_bytes") / len(workers) < 8 * 2**30


@pytest.mark.slow
def test_the_policy_version_is_that_which_drew_and_that_which_was_made(reported):
    assert reported["ray_stage_ray_worker_policy_version", "rollout", "rollout-9"] == 0
    assert reported["ray_stage_ray_worker_policy_version", "learner", RANKS[0]] == 1


@pytest.mark.slow
def test_an_engine_without_an_actor_does_not_even_import_ray():
    code = "import sys, stage_ray.engines, stage_ray.learner; assert not {'ray.util.metrics', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
