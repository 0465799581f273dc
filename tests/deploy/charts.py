"""The chart as Helm renders it, without a cluster. For the tests beside this file."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed (extra test)")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "stage-ray"
GRAFANA = ROOT / "deploy" / "grafana"
IMAGE = {"repository": "registry.example.com/stage-ray", "tag": "0.2.0"}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, as Helm lays values."""
    both = dict(base)
    for key, value in over.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


@functools.cache
def rendered(values: str, name: str) -> dict[str, str]:
    """Path of every template -> its text, for values in JSON; many tests look at the same release."""
    with helm.Chart.load(CHART) as chart:
        return dict(chart.render(json.loads(values), name=name, namespace="stage-ray"))


def render(values: dict[str, Any] | None = None, name: str = "first") -> list[dict[str, Any]]:
    """Every object of a release; an image is given."""
    return [
        item
        for path, text in rendered(json.dumps(merged({"image": IMAGE}, values or {})), name).items()
        if not path.endswith("NOTES.txt")
        for item in yaml.load_all(text, Loader=yaml.CSafeLoader)  # the safe loader of libyaml, ten times as fast
        if item
    ]


def only(objects: list[dict[str, Any]], kind: str, ending: str = "") -> dict[str, Any]:
    """The one object of a kind (whose name ends so)."""
    (found,) = [item for item in objects if item["kind"] == kind and item["metadata"]["name"].endswith(ending)]
    return found


def ray_cluster(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The Ray cluster's spec, in a RayJob or by itself."""
    (found,) = [item for item in objects if item["kind"] in ("RayJob", "RayCluster")]
    return found["spec"].get("rayClusterSpec", found["spec"])


def pod_specs(node: Any, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod spec anywhere in an object, with its place."""
    if isinstance(node, dict):
        if isinstance(node.get("containers"), list):
            yield at, node
        for key, value in node.items():
            yield from pod_specs(value, f"{at}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from pod_specs(value, f"{at}[{index}]")
