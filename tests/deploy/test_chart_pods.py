"""What the chart's pods see, write to and call home."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.deploy.charts import CHART, only, pod_specs, ray_cluster, render

NOBODY = "import os, tempfile\nif os.getuid() == 0: os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
"""Ahead of a script: it goes on as somebody whom the mode of a directory stops."""


def containers(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every container of a release by its place, the autoscaler's included."""
    rendered = render(values)
    found = {
        f"{at}.{container['name']}": container
        for item in rendered
        for at, spec in pod_specs(item)
        for container in [*spec.get("initContainers", []), *spec["containers"]]
    }
    options = ray_cluster(rendered).get("autoscalerOptions")
    return found | ({"autoscaler": options} if options else {})


def environment(container: dict[str, Any]) -> dict[str, str]:
    names = [variable["name"] for variable in container["env"]]
    assert len(names) == len(set(names)), f"twice: {names}"
    return {variable["name"]: variable.get("value", "") for variable in container["env"]}


@pytest.mark.parametrize("autoscaling", [False, True])
def test_a_container_sees_gpus_only_where_it_asked_for_them(autoscaling):
    found = containers({"autoscaling": {"enabled": autoscaling}})
    asking = {at for at, container in found.items() if "nvidia.com/gpu" in container["resources"]["limits"]}
    assert len(asking) == 2 and len(found) >= 5
    told = {at for at, container in found.items() if environment(container).get("NVIDIA_VISIBLE_DEVICES") == "void"}
    assert told == set(found) - asking


def test_ray_counts_gpus_only_on_pods_that_have_them():
    cluster = ray_cluster(render())
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    counted = {group["groupName"]: group["resources"] for group in cluster["workerGroupSpecs"]}
    assert counted == {"learner": {"learner": "4"}, "reward": {"GPU": "0", "reward": "1"}, "rollout": {"rollout": "1"}}


@pytest.mark.parametrize("autoscaling", [False, True])
def test_every_container_has_a_home_that_any_user_can_write_to(autoscaling):
    values = {"podSecurity": {"runAsUser": 4321}, "autoscaling": {"enabled": autoscaling}}
    for at, container in containers(values).items():
        told = environment(container)
        assert told["USER"] and told["HOME"] in ("/tmp", "/home/stage-ray"), at
        if told["HOME"] != "/tmp":
            (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == told["HOME"]]
            assert mount["name"] == "home", at
    for item in render(values):
        for at, spec in pod_specs(item):
            assert {"name": "home", "emptyDir": {}} in spec.get("volumes", [{"name": "home", "emptyDir": {}}]), at


def test_a_cache_on_the_nodes_disk_is_asked_for_and_limited():
    small = {"storage": {"hfCache": {"enabled": False, "size": "7Gi"}}}
    pods = [spec for item in render(small) for at, spec in pod_specs(item) if "submitter" not in at]
    assert len(pods) == 4
    for pod in pods:
        assert {"name": "hf-cache", "emptyDir": {"sizeLimit": "7Gi"}} in pod["volumes"]
        assert pod["containers"][0]["resources"]["requests"]["ephemeral-storage"] == "7Gi"
    assert "ephemeral-storage" not in str(render())


def test_pods_join_the_groups_that_a_shared_file_system_belongs_to():
    joined = [spec for item in render({"podSecurity": {"supplementalGroups": [2000]}}) for _, spec in pod_specs(item)]
    assert len(joined) == 5 and all(spec["securityContext"]["supplementalGroups"] == [2000] for spec in joined)


def check(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = before + (CHART / "files" / "check_volumes.py").read_text()
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


def test_before_ray_starts_the_head_writes_where_the_run_will(tmp_path):
    head = ray_cluster(render())["headGroupSpec"]["template"]["spec"]
    (init,) = head["initContainers"]
    python, script, *arguments = init["command"]
    assert (python, script) == ("python", "/etc/stage-ray/check_volumes.py")
    assert arguments == ["storage.checkpoints=/shared/runs/first", "storage.hfCache=/var/cache/huggingface"]
    assert "check_volumes.py" in only(render(), "ConfigMap", "-config")["data"]
    mounted = {mount["mountPath"] for mount in init["volumeMounts"]}
    assert mounted == {"/etc/stage-ray", "/shared", "/var/cache/huggingface"}

    done = check(*[argument.replace("=", f"={tmp_path}") for argument in arguments])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_a_volume_of_somebody_else_is_told_in_one_sentence(tmp_path):
    closed = tmp_path / "volume"
    closed.mkdir(mode=0o555)
    done = check(f"storage.checkpoints={closed}/runs/first", "storage.hfCache=/tmp", before=NOBODY)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("storage.checkpoints: user ") and "Permission denied" in done.stderr
    assert "podSecurity.supplementalGroups" in done.stderr


def test_a_place_that_takes_no_files_is_told_without_talk_of_groups():
    done = check("storage.checkpoints=/proc/runs")
    assert done.returncode == 1 and "cannot write to /proc: " in done.stderr


@pytest.mark.parametrize("values", [{"mode": "cluster"}, {"job": {"entrypoint": "stage-ray train mine.yaml"}}])
def test_where_the_chart_does_not_know_the_run_directory_nothing_is_checked(values):
    assert "initContainers" not in ray_cluster(render(values))["headGroupSpec"]["template"]["spec"]
