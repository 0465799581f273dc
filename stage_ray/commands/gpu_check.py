"""``stage-ray gpu-check``: does what needs a GPU work on this one? Ten minutes, and a report to paste."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Exit, Option, echo

from stage_ray.config.paths import require_lasting


def gpu_check(
    device: Annotated[Literal["cuda", "cpu"], Option(help="cpu: the same checks with small shapes")] = "cuda",
    quick: Annotated[bool, Option("--quick", help="Small shapes on the GPU too")] = False,
    out: Annotated[Path, Option(help="Where the report goes besides stdout")] = Path("gpu-check.md"),
    minutes: Annotated[float, Option(help="What all checks together may take", min=0.1)] = 10.0,
) -> None:
    """Check engines, learner, weight sync, checkpoints and a run on one GPU; the report is Markdown, to paste.

    Exit codes: 0 all that this machine can do works, 1 a check failed, 2 there is no GPU. Each check is a process of
    its own with a time limit; what a machine cannot do (NCCL with one GPU) is skipped, and the report says why.

    Example: stage-ray gpu-check --device cpu
    """
    require_lasting(out, "--out")
    from stage_ray.bench.gpu_check import command
    from stage_ray.files import require_writable

    require_writable(out, "--out")
    small = quick or device == "cpu"
    outcomes = command.gpu_check(device=device, quick=small, out=out, minutes=minutes, checks=command.checks())
    echo(out.read_text(encoding="utf-8"), nl=False)
    raise Exit(int(any(outcome.state == "failed" for outcome in outcomes)))
