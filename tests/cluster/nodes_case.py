"""Several nodes on one machine: nodes die with what they held, others join. Run by test_nodes.py, apart."""

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


@pytest.fixture
def nodes(tmp_path):
    """A head that runs no actor, and a way to add nodes with resources."""
    environment = with_token(tmp_path)
    quiet = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    quiet["RAY_prestart_worker_first_driver"] = "0"  # one for each CPU of each node, which has no use
    os.environ.update(environment | quiet)  # this process is gone after this test
    from ray._private.authentication.authentication_token_setup import Config

    Config.initialize("")
    settings = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    settings["max_direct_call_object_size"] = 1000  # bytes: else groups of a tiny model travel inside messages
    node = {"object_store_memory": 100 * 2**20, "include_log_monitor": False}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": settings}
    cluster = Cluster(initialize_head=True, head_node_args=node | head)
    cluster.add = lambda **resources: cluster.add_node(num_cpus=4, **node, resources=resources)
    yield cluster
    cluster.shutdown()
    shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


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
def test_nodes_die_with_groups_and_with_a_rank_of_the_learner_others_join_and_no_group_is_lost(tmp_path, plain, nodes):
    """Two of everything; a node goes down with groups in its hands, another one with a worker of each role."""
    first = nodes.add(rollout=1, reward=1)
    second = nodes.add(rollout=1, reward=1, learner=1)
    home = nodes.add(learner=1)
    nodes.wait_for_nodes()
    run = tiny_run(
        tmp_path,
        plain,
        "Slow",  # else steps take the time that nodes and workers need to start
        steps=100_000,
        rollout={
            "engine": "torch",
            "workers": 2,
            "max_workers": 3,
            "group_size": 4,
            "groups_per_step": 8,
            "images_per_batch": 4,  # one group: each worker draws some of a step's, however fast the other one is
            "resources": {"rollout": 1},
        },
        scoring={"workers": 2, "resources": {"reward": 1}},
        learner={"ranks": 2, "resources": {"learner": 1}, "lr": 1e-6},  # else what a step changes is an alarm too
        pipeline={"max_staleness": 1, "order": "arrival"},
        evaluation={"enabled": False},
        cluster={"heartbeat_s": 1.0, "metrics_port": None},
    )
    driver = start(run, nodes.address, tmp_path)

    def served_by(workers: int) -> None:
        """Wait until so many rollout workers serve, and for some steps then."""
        wait_until(lambda: serving(tmp_path)[-1:] == [workers], driver, tmp_path)
        seen = len(serving(tmp_path))
        wait_until(lambda: serving(tmp_path)[seen + 3 :], driver, tmp_path)

    try:
        wait_until(lambda: serving(tmp_path)[2:], driver, tmp_path)
        ranks = [process for node in (second, home) for process in workers_of(node, "LearnerWorker")]
        assert len(ranks) == 2, "each rank on a node of its own"
        for rank in ranks:
            rank.suspend()  # groups that wait for it lie where they were drawn
        wait_until(lambda: stands_still(tmp_path), driver, tmp_path)
        nodes.remove_node(first, allow_graceful=False)
        for rank in ranks:
            rank.resume()
        served_by(1)
        nodes.add(rollout=1, reward=1, learner=1)
        served_by(2)
        assert not alarmed(tmp_path)

        nodes.remove_node(second, allow_graceful=False)
        wait_until(lambda: alarmed(tmp_path), driver, tmp_path)
        nodes.add(rollout=1, reward=1)
        served_by(2)
        driver.terminate()
        assert driver.wait(120) == 128 + signal.SIGTERM, (tmp_path / "driver.log").read_text()
    finally:
        driver.kill()
    assert serving(tmp_path)[:3] == [2, 2, 2]
    assert alarmed(tmp_path) == ["learner_lost"]
    found = audited(tmp_path / "run", ended=True)
    assert found.sound and found.trained == 8 * len(serving(tmp_path)), found
    assert found.reissued > 0, "the node died without taking anything with it: this run shows nothing"
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(list((newest / "shards").iterdir())) == 2


@pytest.mark.slow
def test_a_study_spreads_over_nodes_and_goes_on_elsewhere_with_the_run_of_one_that_dies(tmp_path, plain, nodes):
    """Each node has room for one run: two go on at once, and the one whose node dies is resumed where the other was."""
    both = [nodes.add(), nodes.add()]
    run = tiny_run(tmp_path, plain, steps=60, evaluation={"enabled": False})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    study = {
        "config": str(tmp_path / "base.yaml"),
        "dir": str(tmp_path / "study"),
        "seeds": [2, 3],
        "arms": {"STAGE": {}},
        "cpus_per_run": 4,
        "address": nodes.address,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    directories = [tmp_path / "study" / "stage" / f"seed-{seed}" for seed in (2, 3)]

    def steps(run_dir: Path) -> list[int]:
        path = run_dir / "metrics.jsonl"
        rows = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(row)["step"] for row in rows if row.endswith("\n")]

    command = [sys.executable, "-m", "stage_ray", "study", str(tmp_path / "study.yaml")]
    with (tmp_path / "driver.log").open("wb") as log:
        driver = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)

    def trains(node, seed: int) -> bool:
        try:
            started = [child for worker in workers_of(node, "NodeRun") for child in worker.children()]
            return any(f"seed-{seed}.yaml" in " ".join(child.cmdline()) for child in started)
        except psutil.Error:  # one of Ray's processes ended meanwhile
            return False

    try:
        wait_until(lambda: all(any(trains(node, seed) for node in both) for seed in (2, 3)), driver, tmp_path)
        (dies,) = [node for node in both if trains(node, 2)]
        assert not trains(dies, 3), "each node has room for one"
        wait_until(lambda: len(steps(directories[0])) > 2, driver, tmp_path)
        nodes.remove_node(dies, allow_graceful=False)
        assert driver.wait(600) == 0, (tmp_path / "driver.log").read_text()
    finally:
        driver.kill()
    assert [steps(one) for one in directories] == [[*range(1, 61)]] * 2
    said = [(tmp_path / "study" / "configs" / "stage" / f"seed-{seed}.log").read_text() for seed in (2, 3)]
    assert ["going on after step" in text for text in said] == [True, False]
    assert "<h1>STAGE</h1>" in (tmp_path / "study" / "study.html").read_text()


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
