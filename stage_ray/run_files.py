"""What a run writes step by step, opened at the step it goes on from: metrics, ledger, checkpoints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from stage_ray.alarms import alarms
from stage_ray.checkpoint import CheckpointStore
from stage_ray.cluster import Cluster
from stage_ray.config import RunConfig
from stage_ray.errors import RunError
from stage_ray.ledger import Ledger
from stage_ray.metrics import Recorder
from stage_ray.progress import Progress
from stage_ray.prompts import PromptCursor
from stage_ray.records import Prompt
from stage_ray.stream import GroupStream


class RunFiles:
    """A checkpoint names a byte of the ledger, a prompt and a group; reopening cuts every file back to it (promise 8).

    Attributes:
        first_step: updates that the newest whole checkpoint holds; 0 without one.
    """

    def __init__(
        self, run: RunConfig, run_dir: Path, prompts: list[Prompt], *, resume: bool, progress: Progress
    ) -> None:
        self._run, self._run_dir, self._progress = run, run_dir, progress
        self._store = CheckpointStore(run_dir / "checkpoints", run.checkpoint.keep)
        saved = self._store.latest(progress.note) if resume else None
        facts: Mapping[str, Any] = saved.facts if saved else {"ledger_bytes": 0, "cursor": 0, "next_group": 0}
        self.first_step = saved.step if saved else 0
        self._state = saved.path if saved else None
        self.cursor = PromptCursor(prompts, run.seed, run.prompts.shuffle, position=facts["cursor"])
        self.next_group: int = facts["next_group"]
        self.recorder = Recorder(
            run_dir, run.cluster.metrics_port, run.cluster.metrics_host, resume_step=self.first_step
        )
        self.ledger = Ledger(run_dir / "ledger.jsonl", keep_bytes=facts["ledger_bytes"])

    async def restore(self, cluster: Cluster) -> None:
        """Give the learner the checkpoint's state and every rollout worker its weights."""
        if self._state is not None:
            await cluster.ask_learner("load_state", str(self._state.resolve()))
            await cluster.publish()
            self._progress.note(f"resumed after step {self.first_step} from {self._state}")

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write and show the metrics and alarms of an update."""
        found = alarms(metrics, self._run)
        self.recorder.step(step, {**metrics, "alarms": [name for name, _ in found]})
        self._progress.step(step, self._run.steps, metrics)
        for name, text in found:
            self.recorder.alarm(step, name, text)
            self._progress.alarm(name, text)

    async def checkpoint(self, step: int, cluster: Cluster, stream: GroupStream) -> None:
        """Save everything, when it is due."""
        if step % self._run.checkpoint.every and step != self._run.steps:
            return
        facts = {
            "ledger_bytes": self.ledger.position(),
            "cursor": stream.cursor.position,
            "next_group": stream.next_group,
        }

        def write(directory: Path) -> None:
            ray.get(cluster.learner.save_state.remote(str(directory.resolve())))

        try:
            await asyncio.to_thread(self._store.save, step, write, facts)
        except OSError as error:  # Ray hands on the learner's as one of this kind too
            raise RunError(
                f"checkpoint of step {step} could not be written ({error}); the ones before it are whole"
            ) from error

    def close(self) -> None:
        """Close the files and the metrics endpoint."""
        self.ledger.close()
        self.recorder.close()


class StepClock:
    """Seconds of a step by what the driver waited for."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to `name`."""
        now = time.perf_counter()
        self._laps[f"time/{name}_s"] = now - self._last
        self._last = now

    def metrics(self, images: int) -> dict[str, float]:
        """``time/<lap>_s``, ``time/step_s`` and ``images_per_s``."""
        step_s = self._last - self._start
        return {**self._laps, "time/step_s": step_s, "images_per_s": images / step_s}
