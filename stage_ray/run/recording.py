"""What a run keeps of every step: its metrics, alarms and seconds and, with ``pipeline.record``, its groups."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage_ray.config import RunConfig
from stage_ray.observability.alarms import alarms
from stage_ray.observability.metrics_logger import MetricsLogger
from stage_ray.observability.progress import Progress

if TYPE_CHECKING:
    from stage_ray.cluster.learner import ClusterLearner

GROUPS = "groups"


class StepRecorder(MetricsLogger):
    """Writes and shows the metrics and alarms of a run's steps, from the step on from which it resumes."""

    def __init__(self, run: RunConfig, run_dir: Path, steps: int, progress: Progress, *, resume_step: int = 0) -> None:
        super().__init__(run_dir, run.cluster.metrics_port, run.cluster.metrics_host, resume_step, run)
        self._steps, self._progress = steps, progress
        self._groups, self._keeps_groups = run_dir / GROUPS, run.pipeline.record
        self._ringing: set[str] = set()  # alarms of the last step

    def step(self, step: int, metrics: Mapping[str, Any], more: Sequence[tuple[str, str]] = ()) -> None:
        """Record update ``step``, counted from 1, and the alarms that its metrics raise, and ``more``."""
        found = [*alarms(metrics), *more]
        super().step(step, {**metrics, "alarms": [name for name, _ in found]})
        for directory in self._groups.glob("step-*"):
            if int(directory.name.removeprefix("step-")) >= step:  # of an earlier run, whose steps these replace
                shutil.rmtree(directory)
        self._progress.step(step, self._steps, metrics)
        for name, text in found:
            super().alarm(step, name, text)
            if name not in self._ringing:  # one that goes on for hundreds of steps is shown once
                self._progress.alarm(name, text)
        self._ringing = {name for name, _ in found}

    def alarm(self, step: int, name: str, text: str) -> None:
        """Record an alarm of a step, and show it."""
        super().alarm(step, name, text)
        self._progress.alarm(name, text)

    async def groups(self, step: int, learner: ClusterLearner) -> None:
        """Let the learner write the groups of the last update, where ``pipeline.record`` wants that."""
        if self._keeps_groups:
            await learner.save_batch(self._groups / f"step-{step:06d}")


class StepClock:
    """Seconds of a step by what the driver waited for."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to ``name``."""
        key, now = f"time/{name}_s", time.perf_counter()
        self._laps[key] = self._laps.get(key, 0.0) + now - self._last  # a step that lost groups waits more than once
        self._last = now

    def metrics(self, images: int) -> dict[str, float]:
        """``time/<lap>_s``, ``time/step_s`` and ``images_per_s``."""
        step_s = self._last - self._start
        return {**self._laps, "time/step_s": step_s, "images_per_s": images / step_s}
