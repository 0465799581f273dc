"""What a run keeps of every step: its metrics, alarms and seconds and, with ``pipeline.record``, its groups."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stage_ray.config import RunConfig
from stage_ray.observability.alarms import alarms
from stage_ray.observability.metrics_logger import MetricsLogger
from stage_ray.observability.progress import Progress

if TYPE_CHECKING:
    from stage_ray.cluster.learner import ClusterLearner

GROUPS = "groups"


class StepRecorder:
    """Writes and shows the metrics and alarms of a run's steps, from the step on from which it resumes."""

    def __init__(self, run: RunConfig, run_dir: Path, steps: int, progress: Progress, *, resume_step: int = 0) -> None:
        self._run, self._steps, self._progress = run, steps, progress
        self._groups = run_dir / GROUPS
        self._logger = MetricsLogger(run_dir, run.cluster.metrics_port, run.cluster.metrics_host, resume_step, run)
        self._ringing: set[str] = set()  # alarms of the last step

    def step(self, step: int, metrics: dict[str, float], more: Sequence[tuple[str, str]] = ()) -> None:
        """Record update ``step``, counted from 1, and the alarms that its metrics raise, and ``more``."""
        found = [*alarms(metrics), *more]
        self._logger.step(step, {**metrics, "alarms": [name for name, _ in found]})
        for directory in self._groups.glob("step-*"):
            if int(directory.name.removeprefix("step-")) >= step:  # of an earlier run, whose steps these replace
                shutil.rmtree(directory)
        self._progress.step(step, self._steps, metrics)
        for name, text in found:
            self._logger.alarm(step, name, text)
            if name not in self._ringing:  # one that goes on for hundreds of steps is shown once
                self._progress.alarm(name, text)
        self._ringing = {name for name, _ in found}

    def alarm(self, step: int, name: str, text: str) -> None:
        """Record an alarm of a step."""
        self._logger.alarm(step, name, text)
        self._progress.alarm(name, text)

    def image(self, name: str, step: int, path: Path) -> None:
        """Hand a picture, drawn after update ``step``, to the trackers."""
        self._logger.image(name, step, path)

    async def groups(self, step: int, learner: ClusterLearner) -> None:
        """Let the learner write the groups of the last update, where ``pipeline.record`` wants that."""
        if self._run.pipeline.record:
            await learner.save_batch(self._groups / f"step-{step:06d}")

    def rewind(self, step: int) -> None:
        """Go on after ``step``; what came later is forgotten when the next step is recorded."""
        self._logger.rewind(step)

    def close(self) -> None:
        """Close the files and the metrics endpoint."""
        self._logger.close()


class StepClock:
    """Seconds of a step by what the driver waited for."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to `name`."""
        key, now = f"time/{name}_s", time.perf_counter()
        self._laps[key] = self._laps.get(key, 0.0) + now - self._last  # a step that lost groups waits more than once
        self._last = now

    def metrics(self, images: int) -> dict[str, float]:
        """``time/<lap>_s``, ``time/step_s`` and ``images_per_s``."""
        step_s = self._last - self._start
        return {**self._laps, "time/step_s": step_s, "images_per_s": images / step_s}
