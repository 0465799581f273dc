"""``stage-ray report`` and ``stage-ray metrics``: a run's page written anew, and what its numbers mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option, echo


def report(
    run_dir: Annotated[Path, Argument(metavar="RUN_DIR", help="The directory of a run, finished or not")],
) -> None:
    """Write report.html anew from whatever a run directory holds.

    Example: stage-ray report runs/stage_shapeworld
    """
    from stage_ray.report.report import write_report

    echo(write_report(run_dir))


def metrics(
    markdown: Annotated[bool, Option("--markdown", help="As Markdown: all of deploy/grafana/METRICS.md")] = False,
) -> None:
    """Explain every metric that a run records and its workers report: name, unit, meaning.

    Example: stage-ray metrics
    """
    from stage_ray.observability import registry

    echo(registry.markdown() if markdown else registry.TABLE, nl=False)
