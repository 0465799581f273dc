"""The report: Markdown, to paste into an issue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stage_ray.bench.gpu_check.base import Outcome


def report(machine: Mapping[str, str], outcomes: Sequence[Outcome]) -> str:
    """The verdict, the machine, a row for each check, and the whole reason of each that failed or was skipped."""
    counts = {state: sum(one.state == state for one in outcomes) for state in ("ok", "failed", "skipped")}
    lines = [f"## stage-ray gpu-check: {', '.join(f'{count} {state}' for state, count in counts.items())}", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {_cell(value)} |" for key, value in machine.items()), ""]
    lines += ["| check | result | seconds | figures |", "| --- | --- | --- | --- |"]
    for one in outcomes:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in one.figures.items())
        lines.append(f"| {one.name} | {one.state} | {one.seconds:.0f} | {figures} |")
    for one in outcomes:
        if one.reason:
            lines += ["", f"**{one.name}** {one.state}: {one.reason}"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
