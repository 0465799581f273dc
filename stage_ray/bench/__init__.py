"""``stage-ray bench``: speed claims as ratios against honest baselines measured in the same run. See README.md here."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from stage_ray.bench.rows import Row
from stage_ray.bench.table import print_machine, print_rows, write_rows
from stage_ray.config.hardware import machine_facts
from stage_ray.errors import ConfigError
from stage_ray.observability.progress import Progress

BENCHES = ("rollout", "learner", "sync", "pipeline", "end-to-end")


class Bench(Protocol):
    """What each module here offers as ``bench``."""

    def __call__(self, *, device: str, quick: bool, progress: Progress) -> list[Row]:
        """Measure; ``device`` is cpu or cuda."""
        ...


def run_benches(
    name: str, *, device: str, quick: bool, json_file: Path | None, console: Console | None = None
) -> list[Row]:
    """Run one bench, or all of them; print the machine first and a table after each.

    Args:
        name: one of `BENCHES`, or ``all``.
        device: ``auto`` (a GPU where torch sees one), ``cpu`` or ``cuda``.
        quick: small sizes and few repeats, to see that it works; the ratios are then no claims.
        json_file: gets every row, and is written anew after each bench.

    Raises:
        ConfigError: ``cuda`` on a machine without it.
        RunError: a side of a bench failed.
    """
    console = console or Console()
    machine, place = machine_facts(), resolve_device(device)
    print_machine(console, machine | {"device": place, "size": "quick: no claims" if quick else "full"})
    rows: list[Row] = []
    for chosen in BENCHES if name == "all" else (name,):
        with Progress(console) as progress:
            found = load(chosen)(device=place, quick=quick, progress=progress)
        print_rows(console, found)
        rows += found
        if json_file is not None:
            write_rows(json_file, rows, {"device": place, "quick": quick, "machine": machine})
    console.print(f"\n{met(rows)}")
    return rows


def load(name: str) -> Bench:
    """The bench of that name; imported now, for it brings torch and Ray."""
    module = importlib.import_module(f"stage_ray.bench.{name.replace('-', '_')}")
    bench: Bench = module.bench
    return bench


def resolve_device(device: str) -> str:
    """``auto`` to what is there.

    Raises:
        ConfigError: ``cuda`` where there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no CUDA device here; stage-ray doctor says more")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def met(rows: Sequence[Row]) -> str:
    """How many targets were reached, in words.

    Example:
        >>> met([])
        '0 of 0 targets met'
    """
    return f"{sum(row.met for row in rows)} of {len(rows)} targets met"
