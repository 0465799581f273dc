"""Values that would fail later, in the operator, in Kueue or in the run, are refused with what to do instead."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ray.scripts.scripts import cli as ray_cli

from tests.deploy.charts import CHART, helm, render

RULE = {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}}
RULES_ONLY = {"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0}
GROUP = {"replicas": 1, "cpu": "1", "memory": "4Gi", "shm": "1Gi", "objectStore": "512Mi"}
MONITOR = {"podMonitor": {"enabled": True}}
TWO_PODS_OF_THREE = {"gpus": 3, "cpu": "12", "rayResources": {"rollout": 3}}


def extra(*paths: str) -> dict[str, Any]:
    """Volumes a, b of the head's own, one at each path."""
    names = "abc"[: len(paths)]
    mounts = [{"name": name, "mountPath": path} for name, path in zip(names, paths, strict=True)]
    return {"head": {"extraVolumes": [{"name": name, "emptyDir": {}} for name in names], "extraVolumeMounts": mounts}}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "long job name": ({"fullnameOverride": "a" * 48}, "has 48 characters, and a name in mode job may have 47"),
    "long cluster name": ({"mode": "cluster", "fullnameOverride": "a" * 54}, "in mode cluster may have 53"),
    "name": ({"fullnameOverride": "1st"}, "fullnameOverride .* = 1st: KubeRay wants lower-case"),
    "image": ({"image": {"repository": ""}}, "image.repository is empty"),
    "tag": ({"image": {"tag": ""}}, "image.tag and image.digest are both empty"),
    "old ray": ({"rayVersion": "2.40.0"}, "auth.mode = token needs Ray 2.52"),
    "unused secret": ({"auth": {"mode": "disabled", "existingSecret": "a"}}, "set auth.mode=token"),
    "priority": ({"groups": {"reward": {"priority": 1}}}, "groups.reward.priority = 1 .* autoscaling.enabled=true"),
    "idle v1": (
        {"autoscaling": {"enabled": True, "version": "v1"}, "groups": {"reward": {"idleTimeoutSeconds": 9}}},
        "groups.reward.idleTimeoutSeconds = 9 needs autoscaling.version = v2",
    ),
    "sidecar": ({"job": {"submissionMode": "SidecarMode"}}, "no security context"),
    "interactive": ({"job": {"submissionMode": "InteractiveMode"}}, "mode=cluster"),
    "mode": ({"job": {"submissionMode": "Carrier"}}, "job.submissionMode = Carrier is none of"),
    "both deletions": ({"job": {"deletionRules": [RULE]}}, "exclude each other"),
    "ttl": ({"job": {"shutdownAfterJobFinishes": False}}, "job.ttlSecondsAfterFinished = 600 needs"),
    "suspend": ({"job": RULES_ONLY | {"suspend": True}}, "job.suspend = true needs"),
    "runtime env": ({"job": {"runtimeEnvYAML": "a: b: c"}}, "job.runtimeEnvYAML is not a YAML mapping"),
    "workers": (
        {"autoscaling": {"enabled": True}, "job": RULES_ONLY | {"deletionRules": [RULE | {"policy": "DeleteWorkers"}]}},
        "DeleteWorkers does not go with autoscaling",
    ),
    "twice": ({"job": RULES_ONLY | {"deletionRules": [RULE, RULE]}}, "repeats the rule DeleteCluster for FAILED"),
    "no condition": (
        {"job": RULES_ONLY | {"deletionRules": [{"policy": "DeleteSelf", "condition": {}}]}},
        "has neither jobStatus nor",
    ),
    "order": (
        {
            "job": RULES_ONLY
            | {"deletionRules": [RULE, {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": 5}}]}
        },
        "DeleteSelf after 5 s comes before DeleteCluster after 60 s",
    ),
    "kueue grows": ({"kueue": {"queueName": "q"}, "autoscaling": {"enabled": True}}, "Kueue admits a fixed size"),
    "kueue stays": ({"kueue": {"queueName": "q"}, "job": RULES_ONLY}, "needs job.shutdownAfterJobFinishes = true"),
    "kueue class": ({"kueue": {"priorityClass": "p"}}, "means nothing without kueue.queueName"),
    "kueue groups": ({"kueue": {"queueName": "q"}, "groups": {f"g{i}": GROUP for i in range(5)}}, "has 8: join some"),
    "min max": ({"groups": {"rollout": {"minReplicas": 9}}}, "minReplicas = 9 is more than its maxReplicas = 8"),
    "replicas": ({"groups": {"rollout": {"replicas": 9}}}, "groups.rollout.replicas = 9 is not between"),
    "missing": ({"groups": {"extra": {"replicas": 1, "cpu": "1"}}}, "groups.extra.memory is missing"),
    "no groups": ({"groups": {"rollout": None, "reward": None, "learner": None}}, "groups is empty"),
    "grace": ({"drainSeconds": 110}, "terminationGracePeriodSeconds = 120 is less than drainSeconds = 110"),
    "shm": ({"head": {"shm": "32Gi"}}, "head.shm = 32Gi is more than head.memory = 16Gi"),
    "store": ({"groups": {"reward": {"objectStore": "8Gi"}}}, "groups.reward.objectStore = 8Gi does not fit"),
    "head cpus": ({"head": {"rayStartParams": {"num-cpus": "4"}}}, "runs no actors"),
    "params": ({"groups": {"reward": {"rayStartParams": {"resources": "{}"}}}}, "use groups.reward.rayResources"),
    "k8s token": ({"extraEnv": [{"name": "RAY_ENABLE_K8S_TOKEN_AUTH", "value": "true"}]}, "use auth.mode"),
    "out of the policy": (
        {"groups": {"reward": {"rayLabels": {"app.kubernetes.io/instance": "x"}}}},
        "groups.reward.rayLabels: app.kubernetes.io/instance = x is set by",
    ),
    "another cluster": (
        {"groups": {"reward": {"rayLabels": {"ray.io/cluster": "x"}}}},
        "rayLabels: ray.io/cluster = x",
    ),
    "ray labels": ({"groups": {"reward": {"rayStartParams": {"labels": "a=b"}}}}, "use groups.reward.rayLabels"),
    "labels": ({"head": {"labels": {"ray.io/cluster": "x"}}}, "head.labels: ray.io/cluster = x is set by"),
    "annotation": ({"head": {"annotations": {"checksum/config": "x"}}}, "checksum/config is set by the chart"),
    "token": ({"extraEnv": [{"name": "RAY_AUTH_TOKEN", "value": "x"}]}, "use auth.mode and auth.existingSecret"),
    "gpus": ({"extraEnv": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]}, "use groups.*.gpus"),
    "home": ({"head": {"extraEnv": [{"name": "HOME", "value": "/root"}]}}, "head.extraEnv: HOME is set by the chart"),
    "host path": (
        {"head": {"extraVolumes": [{"name": "a", "hostPath": {"path": "/"}}]}},
        "hostPath is refused in a restricted namespace",
    ),
    "dashboard": ({"monitoring": {"grafanaDashboard": {"enabled": True}}}, "--set-file monitoring.grafanaDashboard"),
    "alerts": ({"monitoring": {"prometheusRule": {"enabled": True}}}, "--set-file monitoring.prometheusRule"),
    "loopback": (
        {"monitoring": MONITOR, "config": {"cluster": {"metrics_host": "127.0.0.1"}}},
        "config.cluster.metrics_host = 127.0.0.1: Prometheus cannot reach it",
    ),
    "no port": ({"monitoring": MONITOR, "config": {"cluster": {"metrics_port": 0}}}, "metrics_port = 0 is no port"),
    "rays port": ({"config": {"cluster": {"metrics_port": 8080}}}, "is one of Ray's own ports"),
    "address": ({"config": {"cluster": {"address": "a:6379"}}}, "config.cluster.address = a:6379 would leave"),
    "no offer": (
        {"config": {"rollout": {"resources": {"rolout": 1}}}},
        "config.rollout.resources = .* is offered by no group",
    ),
    "workers over": ({"config": {"rollout": {"workers": 3}}}, "config.rollout asks for 3 actors .* have room for 2"),
    "ranks over": ({"config": {"learner": {"ranks": 8}}}, r"config.learner asks for 8 actors \(ranks\) .* room for 4"),
    "split worker": (
        {"groups": {"rollout": TWO_PODS_OF_THREE}, "config": {"rollout": {"workers": 3, "tensor_parallel": 2}}},
        r"config.rollout asks for 6 actors \(workers, tensor_parallel = 2 on one pod\) .* have room for 4",
    ),
    "uneven": (
        {"config": {"learner": {"ranks": 3}}},
        "learner.ranks = 3 does not divide config.rollout.groups_per_step",
    ),
    "fat worker": ({"config": {"scoring": {"cpus": 9}}}, "groups.reward have room for 0"),
    "file": ({"configFile": "a: b: c"}, "configFile is not a YAML mapping"),
}


SHM = {"mountPath": "/dev/shm/"}
MOUNTS: dict[str, tuple[dict[str, Any], str]] = {
    "both": (
        {"storage": {"hfCache": {"mountPath": "/shared/"}}},
        "hfCache.mountPath: /shared is taken by storage.check",
    ),
    "shm": ({"storage": {"checkpoints": SHM}}, "storage.checkpoints.mountPath: /dev/shm is taken by the chart"),
    "config": ({"storage": {"hfCache": {"mountPath": "/etc/stage-ray"}}}, "/etc/stage-ray is taken by the chart"),
    "ray": ({"storage": {"hfCache": {"mountPath": "/tmp/ray"}}}, "hfCache.mountPath: /tmp/ray is taken by the chart"),
    "inside": ({"storage": {"hfCache": {"mountPath": "/dev/shm/hf"}}}, "/dev/shm/hf is inside /dev, which the system"),
    "root": ({"storage": {"checkpoints": {"mountPath": "/a/.."}}}, "storage.checkpoints.mountPath: / would hide"),
    "usr": ({"storage": {"checkpoints": {"mountPath": "/usr/"}}}, "/usr would hide what the image has there"),
    "extra": (
        extra("/shared//", "/data"),
        r"extraVolumeMounts \(a\): /shared is taken by storage.checkpoints.mountPath",
    ),
    "twice": (extra("/data", "/data/"), r"extraVolumeMounts \(b\): /data is taken by head.extraVolumeMounts \(a\)"),
    "home": (extra("/home/stage-ray", "/data"), "/home/stage-ray is taken by the chart"),
    "no volume": (
        {"head": {"extraVolumeMounts": [{"name": "a", "mountPath": "/data"}]}},
        "head.extraVolumeMounts: there is no volume a for /data: add it to head.extraVolumes",
    ),
    "one name": ({"head": {"extraVolumes": [{"name": "a", "emptyDir": {}}] * 2}}, "two volumes are named a"),
}


@pytest.mark.parametrize("values, sentence", MOUNTS.values(), ids=MOUNTS.keys())
def test_two_things_at_one_path_or_one_that_hides_the_image_are_refused(values, sentence):
    with pytest.raises(helm.HelmRenderError, match=sentence):
        render(values)


def test_volumes_of_ones_own_may_be_mounted_at_free_paths():
    render(
        extra("/data", "/tmp")
        | {
            "groups": {
                "reward": {
                    "extraVolumeMounts": [{"name": "checkpoints", "mountPath": "/prompts", "subPath": "prompts"}]
                }
            }
        }
    )


STARTED = {
    "port": "6380", "dashboard-port": "1", "dashboard-host": "::", "metrics-export-port": "1", "address": "a:1",
    "dashboard-agent-listen-port": "1", "include-dashboard": "false", "redis-username": "a", "redis-password": "a",
    "plasma-directory": "/tmp", "labels": "a=b", "num-cpus": "1", "num-gpus": "1", "resources": "{}", "memory": "1",
    "object-store-memory": "1", "block": "false", "no-monitor": "true",
}  # fmt: skip


@pytest.mark.parametrize("key", ["head", "groups.reward"])
@pytest.mark.parametrize("name", STARTED)
def test_what_chart_and_operator_rely_on_at_ray_start_is_refused(key, name):
    assert f"--{name}" in {option for each in ray_cli.commands["start"].params for option in each.opts}
    part = {"rayStartParams": {name: STARTED[name]}}
    sentence = rf"{key}.rayStartParams.{name} = .*: .*(use {key}\.\w+|take it out)"
    with pytest.raises(helm.HelmRenderError, match=sentence):
        render({"head": part} if key == "head" else {"groups": {"reward": part}})


@pytest.mark.parametrize("values, sentence", WRONG.values(), ids=WRONG.keys())
def test_what_would_fail_later_is_refused_now(values, sentence):
    with pytest.raises(helm.HelmRenderError, match=sentence):
        render(values)


@pytest.mark.parametrize(
    "values",
    [
        {"imagee": {}},
        {"job": {"backofLimit": 1}},
        {"groups": {"rollout": {"gpu": 1}}},
        {"groups": {"rollout": {"memory": "1.5Gi"}}},
        {"groups": {"Roll_out": GROUP}},
        {"storage": {"checkpoints": {"claim": "a"}}},
        {"monitoring": {"podMonitor": {"enabled": "yes"}}},
        {"mode": "service"},
        {"podSecurity": {"runAsUser": 0}},
        {"extraEnv": [{"name": "A", "secret": "b"}]},
        {"groups": {"reward": {"rayResources": {"reward": 0.5}}}},
        {"networkPolicy": {"operatorNamespace": ""}},
        {"networkPolicy": {"monitoringNamespace": ""}},
        {"storage": {"checkpoints": {"mountPath": "/a;b"}}},
        {"groups": {"reward": {"rayResources": {"big-gpu": 1}}}},
    ],
    ids=json.dumps,
)
def test_keys_and_values_that_the_chart_does_not_know_are_refused(values):
    with pytest.raises(helm.HelmError, match="schema|don't meet"):
        render(values)


def test_the_schema_is_closed_wherever_it_names_keys():
    def walk(node: Any, at: str) -> list[str]:
        if not isinstance(node, dict):
            return []
        found = (
            [at] if node.get("type") == "object" and "properties" in node and "additionalProperties" not in node else []
        )
        return found + [place for key, value in node.items() for place in walk(value, f"{at}.{key}")]

    assert walk(json.loads((CHART / "values.schema.json").read_text()), "") == []


def test_autoscaling_counts_the_pods_that_may_come():
    render({"autoscaling": {"enabled": True}, "config": {"rollout": {"workers": 8}}})


def test_a_worker_of_several_processes_fits_where_one_pod_has_room_for_all_of_them():
    split = {"rollout": {"workers": 2, "tensor_parallel": 2}}
    render({"groups": {"rollout": TWO_PODS_OF_THREE}, "config": split})
