"""``stage-ray report``: write a run's page anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run, finished or not")],
) -> None:
    """Write report.html anew from whatever a run directory holds.

    Example: stage-ray report runs/stage_shapeworld
    """
    from stage_ray.report.report import write_report

    typer.echo(write_report(run_dir))
