"""What the chart's pods see, write to and call home."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deploy.charts import pod_specs, ray_cluster, render


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
