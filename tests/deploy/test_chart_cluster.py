"""The chart against a real API server with KubeRay's custom resources: only where KUBECONFIG names one, with kubectl.

The server alone is enough: no operator and no node is asked, only what the server admits.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.charts import CHART, IMAGE, helm, pod_specs, render

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster to try the chart on"),
    pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed"),
]
MODES = {
    "job": {"mode": "job"},
    "cluster": {"mode": "cluster"},
    "grows": {"mode": "cluster", "autoscaling": {"enabled": True}},
}


def kubectl(*words: str, give: Any = None) -> subprocess.CompletedProcess[str]:
    text = None if give is None else json.dumps(give)
    return subprocess.run(["kubectl", *words], input=text, capture_output=True, text=True, timeout=120)


@pytest.fixture
def namespace() -> Iterator[str]:
    """One that nobody else has, admits only restricted pods, and goes afterwards."""
    name = f"stage-ray-{secrets.token_hex(3)}"
    made = kubectl("create", "namespace", name)
    assert made.returncode == 0, made.stderr
    try:
        labelled = kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
        assert labelled.returncode == 0, labelled.stderr
        kubectl("create", "serviceaccount", "default", "--namespace", name)  # a server without controllers makes none
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


def admitted(namespace: str, spec: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """What the server says to a pod, without keeping it."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "tried"}, "spec": spec}
    return kubectl("create", "--namespace", namespace, "--dry-run=server", "--filename=-", give=pod)


@pytest.mark.parametrize("values", MODES.values(), ids=MODES.keys())
def test_the_server_takes_install_pods_upgrade_and_uninstall(namespace, values):
    with helm.Config(kubeconfig_path=os.environ["KUBECONFIG"], namespace=namespace) as config:
        whole = {"image": IMAGE} | values
        config.install(CHART, "first", whole, namespace=namespace)
        for item in render(values):
            for at, spec in pod_specs(item):
                done = admitted(namespace, spec)
                assert done.returncode == 0, f"{at}: {done.stderr}"
        config.upgrade(CHART, "first", whole | {"drainSeconds": 30}, namespace=namespace, dry_run="server")
        config.upgrade(CHART, "first", whole | {"drainSeconds": 30}, namespace=namespace)
        assert len(config.history("first")) == 2
        config.uninstall("first")


def test_the_namespace_would_refuse_a_pod_that_is_not_restricted(namespace):
    done = admitted(namespace, {"containers": [{"name": "a", "image": "a", "securityContext": {"privileged": True}}]})
    assert done.returncode != 0 and "restricted" in done.stderr
