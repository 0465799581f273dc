"""Where a run's Ray is: an address that leads nowhere is one sentence, at once, that names where it came from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from stage_ray.cluster import runtime
from stage_ray.cluster.runtime import start_ray
from stage_ray.errors import ConfigError, RunError
from tests.ray_head import free_port
from tests.runs import tiny_run


def test_a_cluster_that_is_gone_is_named_with_the_key_or_the_variable(tmp_path, monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    run = tiny_run(tmp_path, tmp_path / "plain", cluster={"address": address})
    with pytest.raises(RunError, match=rf"no Ray cluster answers at cluster.address = '{address}' .*refused"):
        start_ray(run, tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", address)
    for configured in (None, "auto"):
        run = tiny_run(tmp_path, tmp_path / "plain", cluster={"address": configured})
        with pytest.raises(RunError, match=rf"at the variable RAY_ADDRESS = '{address}' .*; unset it"):
            start_ray(run, tmp_path)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://head", "ray://head:10001"])
def test_an_address_of_another_kind_is_refused(tmp_path, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS = '{address}' is no address that a run can join; give HOST"):
        start_ray(tiny_run(tmp_path, tmp_path / "plain"), tmp_path)


@pytest.mark.parametrize(("free_mb", "told"), [(64, True), (4096, False)])
def test_little_shared_memory_is_one_line(monkeypatch, caplog, free_mb, told):
    monkeypatch.setattr(runtime.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_mb * 2**20))
    runtime._tell_of_little_shared_memory(512)
    assert ("/dev/shm has 64 MB free and cluster.object_store_mb is 512" in caplog.text) is told
