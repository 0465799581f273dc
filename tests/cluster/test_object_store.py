"""How large the object store of a run's own Ray is, and what a user is told where it, or a cluster's, is too small."""

from __future__ import annotations

from pathlib import Path

import pytest

from stage_ray.cli import main
from stage_ray.cluster import object_store, runtime
from stage_ray.cluster.object_store import store_mb, two_versions_mb
from stage_ray.commands.plan import config_of, make_plan
from stage_ray.config import RunConfig
from stage_ray.config.load import load_config, validate_config
from stage_ray.config.model_sizes import KNOWN

CONFIG = "configs/stage_shapeworld.yaml"
SEVEN = KNOWN["janus-pro-7b"]


def run_with(*overrides: str) -> RunConfig:
    """The default run with some keys changed."""
    return load_config(Path(CONFIG), list(overrides))


def test_the_default_run_has_the_store_it_had():
    assert store_mb(run_with()) == 512
    assert store_mb(run_with("cluster.object_store_mb=100")) == 100


def test_the_store_of_a_planned_7b_run_holds_two_versions_and_the_images_under_way(monkeypatch):
    monkeypatch.setattr(object_store, "located", lambda path: None)  # it is not in the hub's cache
    sizes = {}
    for dtype, width in (("bfloat16", 2), ("float32", 4)):
        run = validate_config(config_of(make_plan(SEVEN, "h100", 64, dtype=dtype)))
        assert run.cluster.object_store_mb is None
        sizes[dtype] = store_mb(run)
        images = run.rollout.groups_per_step * run.rollout.group_size * 2
        assert sizes[dtype] * 2**20 > 2 * width * SEVEN.trained + images * 384 * 384 * 3
    assert 25_000 < sizes["bfloat16"] < 30_000 < 2 * sizes["bfloat16"] - 1000 < sizes["float32"]
    auto = run.model_copy(update={"rollout": run.rollout.model_copy(update={"dtype": "auto"})})
    assert store_mb(auto) == sizes["bfloat16"]
    assert two_versions_mb(run_with("policy.path=someone/else")) is None


def test_less_than_two_versions_is_refused_before_the_start(monkeypatch, capsys):
    monkeypatch.setattr("stage_ray.run.preflight.two_versions_mb", lambda run: 26_000)
    command = ["train", CONFIG, "--dry-run", "--set", "rollout.engine=torch"]
    assert main([*command, "--set", "cluster.object_store_mb=512"]) == 2
    said = capsys.readouterr().err
    assert "cluster.object_store_mb = 512 is less than two versions of the weights" in said
    assert "need 26000 MB; set it to null" in said
    assert main([*command, "--set", "cluster.object_store_mb=512", "--set", "cluster.address=auto"]) == 0, "not its own"


@pytest.mark.parametrize(("stores", "told"), [((30_000, 4_000), True), ((30_000, 30_000), False)])
def test_a_cluster_with_too_small_a_store_is_one_line(monkeypatch, caplog, stores, told):
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "object_store_memory": mb * 2.0**20}} for mb in stores]
    head = {"Alive": True, "Resources": {"object_store_memory": 2.0**30}}  # without a CPU: no worker comes there
    monkeypatch.setattr(runtime.ray, "nodes", lambda: [*nodes, head, {"Alive": False, "Resources": {"CPU": 1.0}}])
    monkeypatch.setattr(runtime, "two_versions_mb", lambda run: 26_000)
    runtime._tell_of_small_stores(run_with())
    assert ("has 4000 MB of object store, and two versions of the weights need 26000" in caplog.text) is told
