"""The chart's job without Kubernetes: nodes that offer what its pods would, and its own entrypoint and config.

In a pytest process of its own: several nodes change what Ray keeps in one.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ray.cluster_utils import Cluster

from stage_ray.config.load import load_config
from tests.deploy.charts import ROOT, only, ray_cluster, render
from tests.plain import FAMILY
from tests.ray_head import Head, free_port, importing, with_token

POD = {"memory": "2Gi", "shm": "256Mi", "objectStore": "128Mi", "gpus": 0, "tolerations": []}
GROUPS = {
    "rollout": POD | {"replicas": 1, "minReplicas": 1, "maxReplicas": 1, "cpu": "1"},
    "reward": POD | {"replicas": 1, "minReplicas": 1, "maxReplicas": 1, "cpu": "1"},
    "learner": POD | {"replicas": 1, "minReplicas": 1, "maxReplicas": 1, "cpu": "1", "rayResources": {"learner": 1}},
}
SIZES = [
    "steps=2",
    "rollout.engine=torch",
    "rollout.group_size=2",
    "rollout.groups_per_step=2",
    "rollout.threads=1",
    "rollout.resources={rollout: 1}",
    "scoring.resources={reward: 1}",
    "learner.threads=1",
    "learner.resources={learner: 1}",
    "evaluation.enabled=false",
    "cluster.metrics_port=null",
]
ALONE = "STAGE_RAY_TEST_ALONE"
ROLES = {"RolloutWorker": "rollout", "RewardWorker": "reward", "LearnerWorker": "learner"}


def offered(group: dict) -> tuple[dict[str, float], int, int]:
    """Custom resources, CPUs and bytes of object store of one pod, as the operator would start Ray in it."""
    (container,) = group["template"]["spec"]["containers"]
    resources = {name: float(count) for name, count in group.get("resources", {}).items() if name != "GPU"}
    cpus = int(group["rayStartParams"].get("num-cpus", container["resources"]["limits"]["cpu"]))
    return resources, cpus, int(group["rayStartParams"]["object-store-memory"])


@pytest.mark.slow
def test_the_rendered_entrypoint_trains_on_nodes_like_its_pods_and_again_does_nothing(tmp_path, plain):
    if ALONE not in os.environ:
        command = [sys.executable, "-m", "pytest", __file__, "-q"]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {ALONE: "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    light = [f"policy.family={FAMILY}", f"policy.path={plain}", "rewards=[{type: tests.scorers.Brightness}]"]
    config = load_config(ROOT / "configs" / "stage_shapeworld.yaml", SIZES + light)
    run = config.model_dump(mode="json", exclude={"run_dir"})
    storage = {"checkpoints": {"mountPath": str(tmp_path / "volume")}}
    small = {"cpu": "1", "memory": "2Gi", "shm": "256Mi", "objectStore": "128Mi"}
    rendered = render({"configFile": yaml.safe_dump(run), "groups": GROUPS, "head": small, "storage": storage})
    mounted = tmp_path / "config.yaml"
    mounted.write_text(only(rendered, "ConfigMap", "-config")["data"]["config.yaml"])
    entrypoint = only(rendered, "RayJob")["spec"]["entrypoint"].replace("/etc/stage-ray/config.yaml", str(mounted))

    head, nodes = start(ray_cluster(rendered), tmp_path)
    try:
        submit = ["ray", "job", "submit", "--address", head.address, "--", *shlex.split(entrypoint)]
        done = head.command(*submit)
        deadline = time.monotonic() + 60
        while "No available agent" in done.stderr and time.monotonic() < deadline:  # the node's agent is still starting
            done = head.command(*submit)
        assert done.returncode == 0, done.stdout + done.stderr
        metrics = tmp_path / "volume" / "runs" / "first" / "metrics.jsonl"
        assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2]
        assert not (metrics.parent / "logs" / "ray").exists(), "a second Ray was started"

        homes = {node["node_id"]: node["resources_total"] for node in head.state("nodes")}
        actors = [actor for actor in head.state("actors") if actor["class_name"] in ROLES]
        assert len(actors) == 3
        for actor in actors:
            assert ROLES[actor["class_name"]] in homes[actor["node_id"]], actor
        assert len({actor["node_id"] for actor in actors}) == 3, "each on a pod of its own"

        again = head.command(*submit)
        assert again.returncode == 0, again.stdout + again.stderr
        assert len(metrics.read_text().splitlines()) == 2, "nothing was trained twice"
        assert (metrics.parent / "report.html").stat().st_size > 0
    finally:
        nodes.shutdown()
        shutil.rmtree(head.environment["RAY_TMPDIR"], ignore_errors=True)


def start(spec: dict, directory: Path) -> tuple[Head, Cluster]:
    """A head and a node for every pod of a Ray cluster's spec, each with what the operator would start Ray with."""
    (directory / "tests").symlink_to(ROOT / "tests")  # the job names the tests' model family and scorer
    environment = with_token(directory) | importing(directory)
    os.environ.update(environment | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"})
    from ray._private.authentication.authentication_token_setup import Config

    Config.initialize("")  # Ray read the variables when it was imported
    _, cpus, store = offered(spec["headGroupSpec"])
    assert cpus == 0, "the head is for the driver"
    port = free_port()
    here = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    here["dashboard_agent_listen_port"] = free_port()  # it starts the jobs; another Ray may hold the default one
    quiet = {"include_log_monitor": False}  # it would read the workers' logs all the time, for nobody
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": cpus, "object_store_memory": store, **here, **quiet}
    )
    for group in spec["workerGroupSpecs"]:
        resources, cpus, store = offered(group)
        for _ in range(group["replicas"]):
            nodes.add_node(num_cpus=cpus, object_store_memory=store, resources=resources, **quiet)
    nodes.wait_for_nodes()
    return Head(f"http://127.0.0.1:{port}", nodes.address, environment), nodes
