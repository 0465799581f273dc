"""Values that would fail later, in the operator, in Kueue or in the run, are refused with what to do instead."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.deploy.charts import CHART, helm, render

RULE = {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}}
RULES_ONLY = {"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0}
GROUP = {"replicas": 1, "cpu": "1", "memory": "4Gi", "shm": "1Gi", "objectStore": "512Mi"}
MONITOR = {"podMonitor": {"enabled": True}}

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
    "paths": ({"storage": {"hfCache": {"mountPath": "/shared"}}}, "are both /shared"),
    "shm": ({"head": {"shm": "32Gi"}}, "head.shm = 32Gi is more than head.memory = 16Gi"),
    "store": ({"groups": {"reward": {"objectStore": "8Gi"}}}, "groups.reward.objectStore = 8Gi does not fit"),
    "head cpus": ({"head": {"rayStartParams": {"num-cpus": "4"}}}, "runs no actors"),
    "params": ({"groups": {"reward": {"rayStartParams": {"resources": "{}"}}}}, "use groups.reward.rayResources"),
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
    "mount": (
        {"head": {"extraVolumeMounts": [{"name": "a", "mountPath": "/dev/shm/"}]}},
        "head.extraVolumeMounts: /dev/shm/ is mounted by the chart",
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
    "fat worker": ({"config": {"scoring": {"cpus": 9}}}, "groups.reward have room for 0"),
    "file": ({"configFile": "a: b: c"}, "configFile is not a YAML mapping"),
}


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
