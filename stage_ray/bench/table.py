"""Rows and the machine they were measured on, as a person reads them and as a program does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stage_ray.bench.rows import Row
from stage_ray.files import atomic_write

COLUMNS = ("claim", "ratio", "target", "met", "baseline", "ours", "limit", "of limit")


def print_machine(console: Console, machine: Mapping[str, str]) -> None:
    """The machine and the versions of the libraries that matter, one line each."""
    width = max(map(len, machine))
    for name, value in machine.items():
        console.print(f"{name:<{width}}  {value}", markup=False, soft_wrap=True)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """A table of the claims, and under it what each was measured against and what bounds it."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in COLUMNS:
        left = column in ("claim", "met")
        table.add_column(column, overflow="fold" if left else "ellipsis", justify="left" if left else "right")
    for row in rows:
        sign = ">=" if row.better == "higher" else "<="
        met = "[green]yes[/]" if row.met else "[bold red]no[/]"
        limit = "" if row.limit is None else _number(row.limit, row.unit)
        share = "" if row.share_of_limit is None else f"{row.share_of_limit:.0%}"
        numbers = (_number(row.baseline, row.unit), _number(row.ours, row.unit), limit, share)
        table.add_row(row.name, f"{row.ratio:.2f}", f"{sign} {row.target:g}", met, *numbers)
    console.print(table)
    for row in rows:
        console.print(f"\n{row.name}", style="bold", markup=False)
        lines = [f"ratio: {row.ratio_is}; baseline: {row.baseline_is}"]
        if row.limit is not None:
            lines.append(f"limit: {row.limit_is}")
        if row.details:
            lines.append("also measured: " + ", ".join(f"{name} {value:.4g}" for name, value in row.details.items()))
        for line in (*lines, *row.notes):
            console.print(f"  {line}", style="dim", markup=False, highlight=False, soft_wrap=True)


def write_rows(path: Path, rows: Sequence[Row], run: Mapping[str, object]) -> None:
    """The rows as a JSON list, whole or not at all; each carries ``run``: machine, device, quick or not."""
    data = [row.to_json() | dict(run) for row in rows]
    atomic_write(path, json.dumps(data, indent=1, allow_nan=False))


def _number(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
