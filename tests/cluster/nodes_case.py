"""Several nodes on one machine: a node dies with what it held, another one joins. Run by test_nodes.py, apart."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from ray.cluster_utils import Cluster

from tests.chaos import audited
from tests.ray_head import with_token
from tests.runs import tiny_run

REPOSITORY = Path(__file__).parents[2]
STORE = 100 * 2**20


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head that runs no actor."""
    environment = with_token(tmp_path_factory.mktemp("head"))
    quiet = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    quiet["RAY_prestart_worker_first_driver"] = "0"  # one for each CPU of each node, which has no use
    os.environ.update(environment | quiet)  # this process is gone after these tests
    from ray._private.authentication.authentication_token_setup import Config

    Config.initialize("")
    settings = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    settings["max_direct_call_object_size"] = 1000  # bytes: else groups of a tiny model travel inside messages
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": STORE,
            "include_dashboard": False,
            "include_log_monitor": False,
            "_system_config": settings,
        },
    )
    yield cluster
    cluster.shutdown()
    shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


@pytest.fixture
def nodes(head):
    """The cluster with a way to add nodes with resources, which are gone after the test."""
    node = {"num_cpus": 4, "object_store_memory": STORE, "include_log_monitor": False}
    head.add = lambda **resources: head.add_node(**node, resources=resources)
    yield head
    for node in list(head.worker_nodes):
        head.remove_node(node, allow_graceful=False)


def start(run, address: str, directory: Path) -> subprocess.Popen:
    config = directory / "config.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json") | {"run_dir": str(directory / "run")}))
    command = [sys.executable, "-m", "stage_ray", "train", str(config), "--set", f"cluster.address={address}"]
    with (directory / "driver.log").open("wb") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)


def serving(directory: Path) -> list[int]:
    """Rollout workers that could be asked, step by step."""
    path = directory / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [int(json.loads(line)["workers/rollout"]) for line in lines if line.endswith("\n")]


def wait_until(what, driver: subprocess.Popen, directory: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert driver.poll() is None and time.monotonic() < deadline, (directory / "driver.log").read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_node_dies_another_joins_and_no_group_is_lost(tmp_path, plain, nodes):
    first = nodes.add(rollout=1, reward=1)
    nodes.add(rollout=1, reward=1)
    home = nodes.add(learner=1)
    nodes.wait_for_nodes()
    run = tiny_run(
        tmp_path,
        plain,
        steps=100_000,
        rollout={
            "engine": "torch",
            "workers": 2,
            "max_workers": 3,
            "group_size": 4,
            "groups_per_step": 8,
            "images_per_batch": 8,
            "resources": {"rollout": 1},
        },
        scoring={"workers": 2, "resources": {"reward": 1}},
        learner={"resources": {"learner": 1}},
        pipeline={"max_staleness": 1, "order": "arrival"},
        evaluation={"enabled": False},
        cluster={"heartbeat_s": 1.0, "metrics_port": None},
    )
    driver = start(run, nodes.address, tmp_path)
    try:
        wait_until(lambda: serving(tmp_path)[2:], driver, tmp_path)
        (learner,) = workers_of(home, "LearnerWorker")
        learner.suspend()  # groups that wait for it lie where they were drawn
        wait_until(lambda: stands_still(tmp_path), driver, tmp_path)
        nodes.remove_node(first, allow_graceful=False)
        learner.resume()
        wait_until(lambda: serving(tmp_path)[-1] == 1, driver, tmp_path)
        alone = len(serving(tmp_path))
        wait_until(lambda: serving(tmp_path)[alone + 3 :], driver, tmp_path)
        nodes.add(rollout=1, reward=1)
        wait_until(lambda: serving(tmp_path)[-1] == 2, driver, tmp_path)
        joined = len(serving(tmp_path))
        wait_until(lambda: serving(tmp_path)[joined + 3 :], driver, tmp_path)
        driver.terminate()
        assert driver.wait(120) == 128 + signal.SIGTERM, (tmp_path / "driver.log").read_text()
    finally:
        driver.kill()
    assert serving(tmp_path)[:3] == [2, 2, 2]
    found = audited(tmp_path / "run", ended=True)
    assert found.sound and found.trained == 8 * len(serving(tmp_path)), found
    assert found.reissued > 0, "the node died without taking anything with it: this run shows nothing"


@pytest.mark.slow
def test_two_of_everything_on_three_nodes_outlive_a_node_with_a_rank_of_the_learner(tmp_path, plain, nodes):
    """2 learner ranks, 2 rollout and 2 reward workers; a node goes down with one of each on it."""
    added = [nodes.add(rollout=1, reward=1, learner=1) for _ in range(3)]
    nodes.wait_for_nodes()
    run = tiny_run(
        tmp_path,
        plain,
        steps=100_000,
        rollout={"engine": "torch", "workers": 2, "groups_per_step": 4, "resources": {"rollout": 1}},
        scoring={"workers": 2, "resources": {"reward": 1}},
        learner={"ranks": 2, "resources": {"learner": 1}, "lr": 1e-6},  # else what a step changes is an alarm too
        pipeline={"max_staleness": 1, "order": "arrival"},
        evaluation={"enabled": False},
        cluster={"heartbeat_s": 1.0, "metrics_port": None},
    )
    driver = start(run, nodes.address, tmp_path)
    try:
        wait_until(lambda: serving(tmp_path)[3:], driver, tmp_path)
        homes = [node for node in added if len(workers_of(node, "LearnerWorker")) == 1]
        assert len(homes) == 2, "each rank on a node of its own"
        nodes.remove_node(homes[0], allow_graceful=False)
        seen = len(serving(tmp_path))
        wait_until(lambda: alarmed(tmp_path) and serving(tmp_path)[seen + 4 :], driver, tmp_path)
        driver.terminate()
        assert driver.wait(120) == 128 + signal.SIGTERM, (tmp_path / "driver.log").read_text()
    finally:
        driver.kill()
    assert alarmed(tmp_path) == ["learner_lost"]
    assert 2 in serving(tmp_path)[:4] and serving(tmp_path)[-1] == 2
    found = audited(tmp_path / "run", ended=True)
    assert found.sound and found.trained == 4 * len(serving(tmp_path)), found
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(list((newest / "shards").iterdir())) == 2


def workers_of(node, role: str) -> list[psutil.Process]:
    """The processes of a role on a node: children of its raylet."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [process for process in raylet.children() if f"ray::{role}" in " ".join(process.cmdline())]


def stands_still(directory: Path) -> bool:
    """Whether nothing happened to any group for a second."""
    ledger = directory / "run" / "ledger.jsonl"
    before = ledger.stat().st_size
    time.sleep(1)
    return ledger.stat().st_size == before


def alarmed(directory: Path) -> list[str]:
    """Names of the alarms so far."""
    path = directory / "run" / "alarms.jsonl"
    return [json.loads(line)["alarm"] for line in path.read_text().splitlines()] if path.exists() else []
