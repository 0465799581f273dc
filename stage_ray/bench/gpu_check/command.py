"""The command: every check in turn, its line as it comes, and the report on stdout and in a file."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from stage_ray.bench.gpu_check.base import Check, Outcome, Setting, run_check
from stage_ray.bench.gpu_check.report import report
from stage_ray.config.hardware import machine_metadata
from stage_ray.errors import ConfigError
from stage_ray.files import atomic_write


def checks() -> list[Check]:
    """All of them, in the order in which they run."""
    from stage_ray.bench.gpu_check import models, sampling, training

    return [
        Check("models", models.write_models, 120),
        Check("parity/torch", sampling.parity, 90, {"engine": "torch", "dtype": "float32"}),
        Check("parity/vllm", sampling.parity, 150, {"engine": "vllm", "dtype": "auto"}),
        Check("update", training.update, 120),
        Check("sleep/torch", sampling.sleep, 90, {"engine": "torch"}),
        Check("sleep/vllm", sampling.sleep, 150, {"engine": "vllm"}),
        Check("broadcast/nccl", training.broadcast, 90),
        Check("checkpoint", training.checkpoint, 90),
        Check("ten steps", training.short_run, 270, {"limit_s": 260.0}),
        Check("rollout speed", sampling.speed, 200),
    ]


def gpu_check(*, device: str, quick: bool, out: Path, minutes: float, checks: Sequence[Check]) -> list[Outcome]:
    """Run the checks one after the other, for so many minutes in all; the report goes to ``out``, anew after each.

    Raises:
        ConfigError: ``cuda`` on a machine where torch sees none.
    """
    machine = machine_metadata() | _accelerator(device) | {"shapes": "small: no claims" if quick else "full"}
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="stage-ray-gpu-check-") as scratch:
        setting = Setting(device, quick, Path(scratch))
        for check in checks:
            left = deadline - time.monotonic()
            if left > 1:
                outcomes.append(run_check(check, setting, min(check.limit_s, left)))
            else:
                outcomes.append(Outcome(check.name, "failed", 0.0, {}, f"not run: {minutes:g} minutes are over"))
            atomic_write(out, report(machine, outcomes))
    return outcomes


def _accelerator(device: str) -> dict[str, str]:
    """Driver and libraries of the GPU; a ConfigError where there is none to check."""
    import torch

    if device == "cpu":
        return {"device": "cpu"}
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        raise ConfigError(
            f"gpu-check needs a GPU, and torch {torch.__version__} ({built}) sees none here; run it on a machine with "
            "one after make install VARIANT=gpu (stage-ray doctor says what is lacking), or try the checks "
            "themselves with --device cpu"
        )
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    found = {"device": f"cuda, {torch.cuda.device_count()} visible", "driver": _driver()}
    return found | {"CUDA (torch)": str(torch.version.cuda), "NCCL": nccl}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown: nvidia-smi does not answer"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()
