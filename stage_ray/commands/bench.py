"""``stage-ray bench``: ratios against named baselines, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from stage_ray.bench import bench_names

Device = Literal["auto", "cpu", "cuda"]


def bench(
    name: Annotated[str, Argument(metavar="NAME", help=f"{', '.join(bench_names())}, or all")],
    json_file: Annotated[Path | None, Option("--json", help="Also write the rows here, as a list")] = None,
    device: Annotated[Device, Option(help="What computes; auto is a GPU where there is one")] = "auto",
    quick: Annotated[bool, Option("--quick", help="Small and few, to see that it works; ratios say nothing")] = False,
) -> None:
    """Measure how fast this is: ratios against plain code run in turn with ours, and the limit of each.

    rollout: images drawn, by each engine. learner: time and memory of an update. sync: weights to two workers.
    pipeline: what the driver hides and costs. end-to-end: images trained a second, by a real short run.

    A missed target is a fact, not a failure: the exit code is 0 all the same. Let nothing else run meanwhile.

    Example: stage-ray bench rollout --json rollout.json
    """
    from stage_ray.bench.command import run_benches

    run_benches(name, device=device, quick=quick, json_file=json_file)
