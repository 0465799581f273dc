"""Train offline on recorded groups: the learner alone, without Ray, engine or scorers. For debugging an update."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from stage_ray.config import RunConfig
from stage_ray.errors import ConfigError, RunError
from stage_ray.observability.progress import Progress
from stage_ray.run.recording import GROUPS, StepRecorder
from stage_ray.run.run_dir import open_run_dir
from stage_ray.workers.group_files import load_group


def replay(run: RunConfig, source: Path, progress: Progress) -> Path:
    """Repeat the updates of a run that was trained with ``pipeline.record=true``; the new run directory.

    With the same config the metrics of every step are those of the recorded run, clocks apart; with another learner or
    algorithm they show what it would have made of the same images. ``metrics.jsonl`` and ``final/`` are written.

    Args:
        run: its ``run_dir`` is the new one.
        source: the recorded run's directory.

    Raises:
        ConfigError: ``source`` holds no recorded groups.
        RunError: a step is not recorded whole, a group cannot be read, or an update is refused.
    """
    from stage_ray.learner.batch import LearnerError
    from stage_ray.learner.learner import Learner

    steps = sorted(path for path in (source / GROUPS).glob("step-*") if path.is_dir())
    if not steps:
        raise ConfigError(f"--replay {source}: it holds no {GROUPS}/step-*; record a run with pipeline.record=true")
    recorded = {step: sorted(step.glob("group-*.safetensors")) for step in steps}
    for directory, files in recorded.items():
        if len(files) != run.rollout.groups_per_step:  # a step of fewer groups would be another update, and say nothing
            raise RunError(
                f"{directory} holds {len(files)} groups, rollout.groups_per_step is {run.rollout.groups_per_step}: the "
                "run was stopped while it wrote them, or had another config; remove the directory to replay the others"
            )
    with open_run_dir(run, resume=False) as run_dir:
        progress.stage("loading the learner")
        learner = Learner(run, threads=run.learner.threads)
        with closing(StepRecorder(run, run_dir, len(steps), progress)) as recorder:
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
