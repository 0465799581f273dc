"""``stage-ray train``: read a config, check it or train it, or repeat the updates of a recorded run."""

from __future__ import annotations

import gc
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option, echo

from stage_ray.config.paths import require_lasting
from stage_ray.errors import ConfigError, RunError

if TYPE_CHECKING:
    from stage_ray.config import RunConfig
    from stage_ray.observability.progress import Progress

CONFIG = "A YAML file, or the name of a config that ships, such as stage_shapeworld (stage-ray configs lists them)"
ConfigArgument = Annotated[Path, Argument(metavar="CONFIG", help=CONFIG)]
SetOption = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Any key of the config by its dotted name: rollout.gpus=1; repeatable"),
]


def train(
    config: ConfigArgument,
    overrides: SetOption = None,
    run_dir: Annotated[Path | None, Option(help="Where the run writes; run_dir of the config by default")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the run directory's newest checkpoint")] = False,
    auto_resume: Annotated[bool, Option("--auto-resume", help="Go on if there is a run, else begin")] = False,
    extend: Annotated[bool, Option("--extend", help="Go on with a finished run: more steps, another rate")] = False,
    replay: Annotated[Path | None, Option(metavar="RUN_DIR", help="Train the learner alone on recorded groups")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check everything, print the config, start nothing")] = False,
    strict: Annotated[
        bool, Option("--strict", help="With --dry-run: also refuse what would have to be fetched")
    ] = False,
) -> None:
    """Train a model and write a run directory that ends with report.html.

    Example: stage-ray train stage_shapeworld --set learner.lr=1e-5 --run-dir runs/slow
    """
    from stage_ray.config.load import load_config

    # At 700 the collector takes a fifth of the imports to come: it walks what stays again and again.
    gc.set_threshold(100_000)
    run = load_config(config, overrides, run_dir)
    require_lasting(run.run_dir, "run_dir")
    if dry_run:
        from stage_ray.run.preflight import describe

        echo(describe(run, strict=strict))
        return
    from stage_ray.observability.progress import progress_for

    if replay is not None:
        with progress_for(run) as progress:
            progress.note(f"replayed into {replay_run(run, replay, progress)}")
        return
    from stage_ray.evaluation.base import read_result, unlike
    from stage_ray.evaluation.suites import EVALUATION, suite_dirs
    from stage_ray.train import train as train_run

    with progress_for(run) as progress:
        summary = train_run(run, resume="extend" if extend else "auto" if auto_resume else resume, progress=progress)
        for directory in suite_dirs(summary.run_dir):
            before, after = (read_result(directory / f"{name}.json") for name in ("before", "after"))
            was, now = before and before.headline_value, after and after.headline_value
            if before and after and was is not None and now is not None and summary.after is not None:
                suite = "held-out" if directory.name == EVALUATION else f"suite {directory.name}:"
                other = f"{after.headline} " * (after.headline != before.headline)
                progress.note(
                    f"{suite} {before.headline} {was:.3f} before, {other}{now:.3f} after {summary.steps} steps"
                )
                if why := unlike(before.conditions, after.conditions):
                    progress.note(why)
        progress.note(f"report: {summary.report}")


def replay_run(run: RunConfig, source: Path, progress: Progress) -> Path:
    """Repeat the updates of a run of ``pipeline.record=true``, in ``source``, by the learner alone; the new run_dir.

    With the same config the metrics of every step are those of the recorded run, clocks apart; with another learner or
    algorithm they show what it would have made of the same images.

    Raises:
        ConfigError: ``source`` holds no recorded groups.
        RunError: a step is not recorded whole, a group cannot be read, or an update is refused.
    """
    from stage_ray.config.inputs import pin
    from stage_ray.learner.batch import LearnerError
    from stage_ray.learner.learner import Learner
    from stage_ray.run.recording import GROUPS, StepRecorder
    from stage_ray.run.run_dir import known_commits, open_run_dir
    from stage_ray.workers.group_files import load_group

    recorded = {step: sorted(step.glob("group-*.safetensors")) for step in sorted((source / GROUPS).glob("step-*"))}
    if not recorded:
        raise ConfigError(f"--replay {source}: it holds no {GROUPS}/step-*; record a run with pipeline.record=true")
    for directory, files in recorded.items():
        if len(files) != run.rollout.groups_per_step:  # a step of fewer groups would be another update, and say nothing
            raise RunError(
                f"{directory} holds {len(files)} groups, rollout.groups_per_step is {run.rollout.groups_per_step}: the "
                "run was stopped while it wrote them, or had another config; remove the directory to replay the others"
            )
    run, commits = pin(run, known_commits(source))
    with open_run_dir(run, resume=False, commits=commits, note=progress.note) as run_dir:
        progress.stage("loading the learner")
        learner = Learner(run, threads=run.learner.threads)
        with closing(StepRecorder(run, run_dir, len(recorded), progress)) as recorder:
            for step, (directory, files) in enumerate(recorded.items(), start=1):
                groups, scored = zip(*map(load_group, files), strict=True)
                began = time.perf_counter()
                try:
                    metrics = learner.update(groups, scored)
                except LearnerError as error:
                    raise RunError(f"replay of {directory}: {error}") from error
                seconds = time.perf_counter() - began
                metrics |= {"time/step_s": seconds, "images_per_s": metrics["images"] / seconds}
                recorder.step(step, metrics)
        learner.export(run_dir / "final")
    return run_dir
