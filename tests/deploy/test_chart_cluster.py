"""The chart against a real API server with KubeRay's custom resources: only where KUBECONFIG names one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from tests.deploy.charts import CHART, IMAGE, helm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster to try the chart on"),
]


@pytest.fixture
def release() -> Iterator[tuple[helm.Config, str]]:
    """A connection, and a namespace and release name that nobody else has; the namespace itself stays."""
    name = f"stage-ray-{secrets.token_hex(3)}"
    with helm.Config(kubeconfig_path=os.environ["KUBECONFIG"], namespace=name) as config:
        yield config, name
        config.uninstall(name, ignore_not_found=True)


@pytest.mark.parametrize("mode", ["job", "cluster"])
def test_the_server_takes_install_upgrade_and_uninstall(release, mode):
    config, name = release
    values = {"image": IMAGE, "mode": mode}
    config.install(CHART, name, values, namespace=name, create_namespace=True)
    config.upgrade(CHART, name, values | {"drainSeconds": 30}, namespace=name, dry_run="server")
    config.upgrade(CHART, name, values | {"drainSeconds": 30}, namespace=name)
    assert len(config.history(name)) == 2
    config.uninstall(name)
