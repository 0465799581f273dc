"""``stage-ray train``: read a config, check it or train it, or repeat the updates of a recorded run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option, echo

OverridesOption = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override a key by its dotted name; may be repeated")
]


def train(
    config: Annotated[Path, Argument(metavar="CONFIG", help="A YAML file, such as configs/stage_shapeworld.yaml")],
    overrides: OverridesOption = None,
    run_dir: Annotated[Path | None, Option(help="Where the run writes; run_dir of the config by default")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the run directory's newest checkpoint")] = False,
    auto_resume: Annotated[
        bool, Option("--auto-resume", help="Go on if there is a run, else begin; for retries")
    ] = False,
    replay: Annotated[
        Path | None,
        Option(
            metavar="RUN_DIR", help="Train the learner alone on groups that RUN_DIR recorded (pipeline.record=true)"
        ),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check everything, print the config, start nothing")] = False,
) -> None:
    """Train a model and write a run directory that ends with report.html.

    Example: stage-ray train configs/stage_shapeworld.yaml --set learner.lr=1e-5 --run-dir runs/slow
    """
    from stage_ray.config.load import load_config

    run = load_config(config, overrides, run_dir)
    if dry_run:
        from stage_ray.run.preflight import describe

        echo(describe(run))
        return
    from stage_ray.observability.progress import progress_for

    if replay is not None:
        from stage_ray.commands.replay import replay as replay_run

        with progress_for(run) as progress:
            progress.note(f"replayed into {replay_run(run, replay, progress)}")
        return
    from stage_ray.evaluation.base import find_benchmark
    from stage_ray.train import train as train_run

    with progress_for(run) as progress:
        summary = train_run(run, resume="auto" if auto_resume else resume, progress=progress)
        if summary.before is not None and summary.after is not None:
            headline = find_benchmark(run.evaluation.benchmark).headline
            progress.note(
                f"held-out {headline} {summary.before:.3f} before, {summary.after:.3f} after {summary.steps} steps"
            )
        progress.note(f"report: {summary.report}")
