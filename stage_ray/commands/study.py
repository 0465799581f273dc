"""``stage-ray study``: the arms of a study file, searched, trained and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option, echo

from stage_ray.config.paths import require_lasting


def study(
    file: Annotated[
        Path, Argument(metavar="STUDY", help="A YAML file of config, dir, seeds, arms, set, search; or one that ships")
    ],
    dry_run: Annotated[bool, Option("--dry-run", help="List the runs and which are done; start nothing")] = False,
    export: Annotated[
        Path | None,
        Option(metavar="DIR", help="Write the runs that are done, small, for --kept and stage-ray compare; train none"),
    ] = None,
    kept: Annotated[
        Path | None, Option(metavar="DIR", help="Runs that --export wrote: they count as done, and are not trained")
    ] = None,
    arms: Annotated[
        list[str] | None, Option("--arm", metavar="NAME", help="Only this arm of the study; again for more")
    ] = None,
    seeds: Annotated[
        list[int] | None,
        Option("--seed", metavar="N", help="Report this seed alone; a search keeps its own; again for more"),
    ] = None,
) -> None:
    """Train arms that differ in a few keys on several seeds each, and compare them on one page.

    Where the file has a search, each arm first finds its own value of a key, such as the learning rate, with the same
    values and steps as all others, on other seeds. Runs go on side by side where there are cores: on this machine, or
    on the nodes of a Ray cluster (address in the file, or RAY_ADDRESS). What is done is skipped and what was cut off
    goes on, so the same command finishes a study that was stopped. A part of it (--arm, --seed) has a page of its own,
    and its runs are the whole study's, too.

    Example: stage-ray study study.yaml --dry-run

    Example: stage-ray study study.yaml --seed 31
    """
    from stage_ray.observability.progress import Progress
    from stage_ray.study.config import read_study
    from stage_ray.study.study import Study

    config, part = read_study(file).part(arms or [], seeds or [])
    require_lasting(config.dir, "dir")
    require_lasting(export, "--export")
    with Progress() as progress:
        found = Study(config, progress, "-".join([file.stem, *part]))
        if kept is not None:
            found.keep(kept)
        if dry_run:
            for run, done in found.plan():
                echo(f"{'done' if done else 'to do'}  {run.label}  {run.directory}")
        elif export is not None:
            echo(f"{found.export(export)} runs: {export}")
        else:
            progress.note(f"study: {found.run()}")
