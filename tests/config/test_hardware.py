"""Cores that a process may use: those of its affinity, and no more than its control groups grant."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stage_ray.config import hardware
from stage_ray.config.hardware import usable_cpus

DOCKER = "11:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/job/step\n", {"job/cpu.max": "800000 100000\n", "job/step/cpu.max": "max 100000\n"}, 8),
        ("0::/hidden/in/a/container\n", {"cpu.max": "250000 100000\n"}, 2),
        (DOCKER, {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 3),
        (DOCKER, {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 64),
        ("3:memory:/a\n", {}, 64),
        ("0::/\n", {"cpu.max": "what is this"}, 64),
        (None, {}, 64),
    ],
)
def test_a_quota_limits_the_cores(tmp_path, monkeypatch, cgroup, files, cores):
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    if cgroup is not None:
        (tmp_path / "cgroup").write_text(cgroup)
    monkeypatch.setattr(hardware, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert usable_cpus() == cores


def test_an_affinity_limits_them_too(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "CGROUP", Path(tmp_path / "none"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert usable_cpus() == 2
