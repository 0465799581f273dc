"""What the chart renders: right by the schemas of Kubernetes and KubeRay, every pod within `restricted`."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stage_ray.config.load import validate_config
from tests.deploy.charts import CHART, GRAFANA, IMAGE, ROOT, helm, only, pod_specs, ray_cluster, render
from tests.deploy.test_chart_overlay import EVERYTHING

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
jsonschema = pytest.importorskip("jsonschema")

MONITORED = {
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "grafanaDashboard": {"enabled": True, "json": (GRAFANA / "stage-ray.json").read_text()},
    "prometheusRule": {"enabled": True, "rules": (GRAFANA / "alerts.yaml").read_text()},
}
CLAIMS = {"checkpoints": {"existingClaim": "runs"}, "hfCache": {"existingClaim": "weights"}}
SHAPEWORLD = (ROOT / "configs" / "stage_shapeworld.yaml").read_text()
QUEUE = {"queueName": "team", "priorityClass": "low"}


def matrix() -> dict[str, dict[str, Any]]:
    cases = {}
    for mode, size, monitored, claims, whole in itertools.product(
        ("job", "cluster"), ("fixed", "autoscaling", "kueue"), (False, True), (False, True), (False, True)
    ):
        values: dict[str, Any] = {"mode": mode}
        values |= {"autoscaling": {"enabled": True}} if size == "autoscaling" else {}
        values |= {"kueue": QUEUE} if size == "kueue" else {}
        values |= {"storage": CLAIMS} if claims else {}
        text = SHAPEWORLD + "\ncluster: {metrics_host: 0.0.0.0, metrics_port: 9400}\n"
        values |= {"configFile": text} if whole else {}
        values |= {"monitoring": MONITORED} if monitored else {}
        words = [mode, size, monitored and "monitored", claims and "claims", whole and "file"]
        cases["-".join(word for word in words if word)] = values
    cases["rules"] = {
        "job": {
            "shutdownAfterJobFinishes": False,
            "ttlSecondsAfterFinished": 0,
            "deletionRules": [{"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}}],
        }
    }
    cases["http"] = {"job": {"submissionMode": "HTTPMode", "activeDeadlineSeconds": 9}}
    cases["no-cache"] = {"storage": {"hfCache": {"enabled": False}}, "serviceAccount": {"create": False}}
    cases["overlay"] = EVERYTHING
    cases["overlay-cluster-autoscaling"] = EVERYTHING | {"mode": "cluster", "autoscaling": {"enabled": True}}
    cases["groups"] = {
        "autoscaling": {"enabled": True},
        "groups": {"reward": {"priority": 5, "idleTimeoutSeconds": 60, "rayLabels": {"zone": "a"}}},
        "secretEnv": {"existingSecret": "hush"},
        "imagePullSecrets": [{"name": "registry"}],
        "networkPolicy": {"allowFrom": [{"podSelector": {"matchLabels": {"app": "gateway"}}}]},
    }
    return cases


CASES = matrix()
every_case = pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())


def strict(schema: Any) -> Any:
    """A custom resource's schema, closed to keys that it does not name; int-or-string and nullable in plain words."""
    if not isinstance(schema, dict):
        return [strict(item) for item in schema] if isinstance(schema, list) else schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and "type" in closed and not closed.get("additionalProperties"):
        closed["additionalProperties"] = bool(closed.get("x-kubernetes-preserve-unknown-fields"))
    if closed.pop("nullable", False) and isinstance(closed.get("type"), str):
        closed["type"] = [closed["type"], "null"]
    return closed


@functools.cache
def resource(kind: str) -> Any:
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("KUBERAY_CRDS names no directory with the custom resources of KubeRay 1.7")
    text = (Path(folder) / f"ray.io_{kind.lower()}s.yaml").read_text()
    (version,) = [v for v in yaml.load(text, yaml.CSafeLoader)["spec"]["versions"] if v["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


@every_case
def test_core_objects_are_ones_that_kubernetes_takes(values):
    core = [
        item for item in render(values) if "ray.io" not in item["apiVersion"] and "coreos" not in item["apiVersion"]
    ]
    assert {"ConfigMap", "NetworkPolicy"} <= {item["kind"] for item in core}
    for item in core:
        kubernetes_validate.validate(item, "1.34", strict=True)


@every_case
def test_pod_specs_inside_the_ray_objects_are_ones_that_kubernetes_takes(values):
    for item in render(values):
        for at, spec in pod_specs(item):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}
            kubernetes_validate.validate(pod, "1.34", strict=True), at


@every_case
def test_ray_objects_are_ones_that_kuberay_takes(values):
    (item,) = [item for item in render(values) if item["apiVersion"] == "ray.io/v1"]
    problems = [f"{error.json_path}: {error.message[:200]}" for error in resource(item["kind"]).iter_errors(item)]
    assert not problems


def test_a_key_that_kuberay_does_not_know_would_be_seen():
    job = only(render(), "RayJob")
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParam"] = {}
    assert list(resource("RayJob").iter_errors(job))


@every_case
def test_every_pod_is_restricted(values):
    seen = [(at, spec) for item in render(values) for at, spec in pod_specs(item)]
    assert len(seen) >= 4
    for at, spec in seen:
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True and pod["runAsUser"] > 0, at
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, at
        assert spec["automountServiceAccountToken"] is False, at
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), at
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert_restricted(container["securityContext"])
        for volume in spec.get("volumes", []):
            assert set(volume) - {"name"} <= {"emptyDir", "configMap", "persistentVolumeClaim", "projected"}, at
    cluster = ray_cluster(render(values))
    if cluster["enableInTreeAutoscaling"]:
        assert_restricted(cluster["autoscalerOptions"]["securityContext"])


def assert_restricted(context: dict[str, Any]) -> None:
    assert context["allowPrivilegeEscalation"] is False and context["capabilities"]["drop"] == ["ALL"]
    assert not context.get("privileged") and "add" not in context["capabilities"]


def test_helm_finds_nothing_to_say_against_the_chart():
    report = helm.lint(CHART, {"image": IMAGE}, strict=True, kube_version="v1.34.0")
    assert report["errors"] == [] and all(message["severity"] < 2 for message in report["messages"]), report


def test_the_default_config_is_one_that_the_run_takes():
    run = validate_config(yaml.safe_load(only(render(), "ConfigMap", "-config")["data"]["config.yaml"]))
    assert run.cluster.metrics_host == "0.0.0.0" and run.cluster.metrics_port == 9400
    assert run.learner.lr == 5e-6


def test_a_config_file_goes_in_as_it_is_and_a_change_of_it_changes_every_pod():
    def checksums(text: str) -> set[str]:
        groups = ray_cluster(render({"configFile": text}))
        pods = [groups["headGroupSpec"], *groups["workerGroupSpecs"]]
        return {pod["template"]["metadata"]["annotations"]["checksum/config"] for pod in pods}

    assert only(render({"configFile": SHAPEWORLD}), "ConfigMap", "-config")["data"]["config.yaml"].strip() == (
        SHAPEWORLD.strip()
    )
    assert len(checksums(SHAPEWORLD)) == 1 and checksums(SHAPEWORLD) != checksums(SHAPEWORLD + "# another\n")


def test_the_head_runs_no_actors_and_the_entrypoint_resumes_on_the_volume():
    job = only(render(name="paper"), "RayJob")["spec"]
    assert job["entrypoint"] == "stage-ray train /etc/stage-ray/config.yaml --run-dir /shared/runs/paper --auto-resume"
    head = job["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0" and job["backoffLimit"] == 2
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    (container,) = head["template"]["spec"]["containers"]
    assert "stop_driver.py" in " ".join(container["lifecycle"]["preStop"]["exec"]["command"])


def test_the_runs_outlive_the_release_and_claims_that_exist_are_not_made_again():
    claims = [item for item in render() if item["kind"] == "PersistentVolumeClaim"]
    kept = {c["metadata"]["name"]: c["metadata"].get("annotations", {}) for c in claims}
    assert kept == {"first-checkpoints": {"helm.sh/resource-policy": "keep"}, "first-hf-cache": {}}
    assert not [item for item in render({"storage": CLAIMS}) if item["kind"] == "PersistentVolumeClaim"]


def named(word: Callable[[int], str], mode: str) -> dict[str, Any]:
    """Values whose free names are all such words, each with a number of its own."""
    claim = {"existingClaim": "", "storageClass": word(1)}
    group = {"replicas": 1, "cpu": "8", "memory": "4Gi", "shm": "1Gi", "objectStore": "100000000"}
    group |= {"rayResources": {word(2): 1}, "rayLabels": {word(3): word(4)}, "labels": {word(5): word(6)}}
    queue = {"queueName": word(7), "priorityClass": word(8)}
    return {
        "mode": mode,
        "auth": {"existingSecret": word(9)},
        "secretEnv": {"existingSecret": word(10)},
        "kueue": queue,
        "groups": {"on" if word(0).isdigit() else "one": group},
        "head": {"nodeSelector": {word(11): word(12)}, "runtimeClassName": word(13), "annotations": {"a": word(14)}},
        "storage": {"checkpoints": claim | {"size": word(15)}, "hfCache": {"existingClaim": word(16)}},
        "serviceAccount": {"create": False, "name": word(17)},
        "imagePullSecrets": [{"name": word(18)}],
        "networkPolicy": {"operatorNamespace": word(19), "monitoringNamespace": word(20)},
        "monitoring": {"podMonitor": {"enabled": True, "labels": {word(21): word(22)}}},
        "extraEnv": [{"name": "A", "value": word(23)}],
    }


def kinds(node: Any) -> Any:
    """What an object is made of: the types of its keys and values."""
    if isinstance(node, dict):
        return [(type(key), kinds(value)) for key, value in node.items()]
    return [kinds(item) for item in node] if isinstance(node, list) else type(node)


@pytest.mark.parametrize("mode", ["job", "cluster"])
def test_names_that_yaml_could_take_for_numbers_or_booleans_stay_text(mode):
    plain = render(named(lambda n: f"1{n}Gi" if n == 15 else f"a{n}", mode) | {"fullnameOverride": "paper"}, "run")
    other = render(named(lambda n: str(100 + n), mode) | {"fullnameOverride": "on"}, "123")
    assert len(plain) == len(other) >= 5
    for item, same in zip(plain, other, strict=True):
        assert kinds(item) == kinds(same), item["kind"]


def test_only_the_autoscaler_has_a_token_of_kubernetes():
    head = ray_cluster(render({"autoscaling": {"enabled": True}}))["headGroupSpec"]["template"]["spec"]
    assert "serviceAccountName" not in head and "autoscaler-token" in {v["name"] for v in head["volumes"]}
    assert "autoscaler-token" not in {m["name"] for m in head["containers"][0]["volumeMounts"]}


def test_others_reach_the_jobs_api_alone_and_prometheus_the_metrics():
    rules = only(render({"monitoring": MONITORED}), "NetworkPolicy")["spec"]["ingress"]
    assert [[port["port"] for port in rule.get("ports", [])] for rule in rules] == [
        [],
        [8265],
        [8080, 44217, 44227, 9400],
    ]
    assert rules[0]["from"] == [{"podSelector": only(render(), "NetworkPolicy")["spec"]["podSelector"]}]


def test_every_series_says_of_which_release_it_is():
    monitor = only(render({"monitoring": MONITORED}, "paper"), "PodMonitor")["spec"]
    assert monitor["podTargetLabels"] == ["app.kubernetes.io/instance"]
    assert monitor["selector"]["matchLabels"]["app.kubernetes.io/instance"] == "paper"
