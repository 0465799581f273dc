"""The command: runs benches, shows rows and the machine they were measured on, and writes both as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stage_ray.bench import BENCHES, bench_names
from stage_ray.bench.base import Row
from stage_ray.config.hardware import machine_metadata
from stage_ray.errors import ConfigError
from stage_ray.files import atomic_write
from stage_ray.observability.progress import Progress

COLUMNS = ("claim", "ratio", "target", "met", "baseline", "ours", "limit", "of limit")

THROUGHPUT = {"images_per_s": "images/s", "tokens_per_s": "tokens/s", "mfu": "MFU", "peak_mib": "peak MiB"}
"""Details of a row that have columns of their own -> what stands above each; `machine.throughput` makes them."""


def run_benches(name: str, *, device: str, quick: bool, json_file: Path | None) -> list[Row]:
    """Run one bench, or all of them; print the machine first and a table after each.

    ``name`` is one of `bench_names`, ``all``, or the dotted path of a `stage_ray.bench.base.Bench` of your own;
    ``json_file`` gets every row, and is written anew after each bench.

    Raises:
        ConfigError: no such bench, or ``cuda`` on a machine without it.
        RunError: a variant of a bench failed.
    """
    import torch

    names = bench_names() if name == "all" else [name]
    benches = [BENCHES.find(chosen.replace("-", "_"), "bench") for chosen in names]
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no CUDA device here; stage-ray doctor says more")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    console, machine, rows = Console(), machine_metadata(), list[Row]()
    shown = machine | {"device": device, "size": "quick: no claims" if quick else "full"}
    for key, value in shown.items():
        console.print(f"{key:<{max(map(len, shown))}}  {value}", markup=False, soft_wrap=True)
    for bench in benches:
        with Progress(console) as progress:
            found = bench(device=device, quick=quick, progress=progress).rows()
        print_rows(console, found)
        rows += found
        if json_file is not None:
            run = {"device": device, "quick": quick, "machine": machine}
            atomic_write(json_file, json.dumps([row.to_json() | run for row in rows], indent=1, allow_nan=False))
    console.print(f"\n{sum(row.met for row in rows)} of {len(rows)} targets met")
    return rows


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """A table of the claims, and under it what each was measured against and what bounds it."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in COLUMNS:
        left = column in ("claim", "met")
        table.add_column(column, overflow="fold" if left else "ellipsis", justify="left" if left else "right")
    for row in rows:
        target = f"{'>=' if row.better == 'higher' else '<='} {row.target:g}"
        met = "[green]yes[/]" if row.met else "[bold red]no[/]"
        share = "" if row.share_of_limit is None else f"{row.share_of_limit:.0%}"
        numbers = (_number(value, row.unit) for value in (row.baseline, row.ours, row.limit))
        table.add_row(row.name, f"{row.ratio:.2f}", target, met, *numbers, share)
    console.print(table)
    print_throughput(console, rows)
    for row in rows:
        console.print(f"\n{row.name}", style="bold", markup=False)
        lines = [f"ratio: {row.ratio_is}; baseline: {row.baseline_is}"]
        if row.limit is not None:
            lines.append(f"limit: {row.limit_is}")
        if others := {name: value for name, value in row.details.items() if name not in THROUGHPUT}:
            lines.append("also measured: " + ", ".join(f"{name} {value:.4g}" for name, value in others.items()))
        for line in (*lines, *row.notes):
            console.print(f"  {line}", style="dim", markup=False, highlight=False, soft_wrap=True)


def print_throughput(console: Console, rows: Sequence[Row]) -> None:
    """A table of what ours does a second, where rows say so; nothing where none does."""
    if not any(THROUGHPUT.keys() & row.details.keys() for row in rows):
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("ours", overflow="fold")
    for column in THROUGHPUT.values():
        table.add_column(column, justify="right")
    for row in rows:
        found = [row.details.get(name) for name in THROUGHPUT]
        if any(value is not None for value in found):
            table.add_row(row.name, *("" if value is None else f"{value:.4g}" for value in found))
    console.print()
    console.print(table)


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
