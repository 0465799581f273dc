"""What a run writes step by step, opened at the step it goes on from: metrics, ledger, checkpoints, recordings."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from stage_ray.actors.supervised import ArgumentsLost
from stage_ray.cluster.cluster import Cluster, GroupRefs, GroupsLostError
from stage_ray.config import RunConfig
from stage_ray.errors import LearnerLostError, RunError
from stage_ray.observability.alarms import alarms
from stage_ray.observability.metrics_logger import MetricsLogger
from stage_ray.observability.progress import Progress
from stage_ray.pipeline.buffer import Failed
from stage_ray.pipeline.ledger import Ledger
from stage_ray.pipeline.prompts import PromptCursor
from stage_ray.pipeline.stream import GroupStream, Outcome
from stage_ray.records import Prompt
from stage_ray.run.checkpoint import Checkpoint, CheckpointStore

GROUPS = "groups"
LEARNER_LIVES = 3


class RunState:
    """A checkpoint names a byte of the ledger, a prompt and a group, and holds the groups that were on their way;
    going on from it cuts every file back to it (promise 8).

    Attributes:
        step: updates that the newest whole checkpoint holds; 0 without one.
    """

    def __init__(
        self, run: RunConfig, run_dir: Path, prompts: list[Prompt], *, resume: bool, progress: Progress
    ) -> None:
        self._run, self._run_dir, self._progress, self._prompts = run, run_dir, progress, prompts
        self._store = CheckpointStore(run_dir / "checkpoints", run.checkpoint.keep)
        self._saving: asyncio.Task[None] | None = None
        self._losses = 0
        self._go_back(self._store.latest(progress.note) if resume else None)
        self.recorder = MetricsLogger(
            run_dir, run.cluster.metrics_port, run.cluster.metrics_host, resume_step=self.step
        )

    async def rewind(self, lost: RunError) -> None:
        """Back to the newest checkpoint: the learner lost all that came after it.

        Raises:
            RunError: ``lost`` itself, when it happened `LEARNER_LIVES` times without a new checkpoint between.
        """
        self._losses += 1
        if self._losses >= LEARNER_LIVES:
            raise RunError(f"the learner was lost {self._losses} times since step {self.step}; {lost}") from lost
        self._ledger.close()
        self._go_back(self._store.latest(self._progress.note))
        self.recorder.rewind(self.step)

    async def restore(self, cluster: Cluster) -> None:
        """Give the learner the checkpoint's state and every rollout worker its weights.

        Raises:
            LearnerLostError: it died meanwhile; `rewind` and try again.
        """
        cluster.accept_learner()
        if self._checkpoint is not None:
            path = str(self._checkpoint.path.resolve())
            await cluster.call_learner(lambda worker: worker.load_state.remote(path))
            self._progress.note(f"going on after step {self.step} from {self._checkpoint.path}")
        if self._checkpoint is not None or cluster.published:
            await cluster.publish()

    @asynccontextmanager
    async def stream(self, cluster: Cluster) -> AsyncIterator[GroupStream]:
        """The stream of groups from here on, those that the checkpoint had on their way in their old places.

        When it ends, nothing is being saved any more, however it ends.
        """
        stream = GroupStream(cluster, self._run, self._cursor, self._ledger, self._next_group, step=self.step)
        if self._checkpoint is not None:
            stream.restore(await self._load_groups(cluster, self._checkpoint.path / GROUPS))
        async with stream:
            try:
                yield stream
            finally:
                saving, self._saving = self._saving, None
                if saving is not None:
                    saving.cancel()
                    await asyncio.gather(saving, return_exceptions=True)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write and show the metrics and alarms of an update."""
        record_update(self._run, self.recorder, self._progress, step, self._run.steps, metrics)

    def alarm(self, step: int, name: str, text: str) -> None:
        """Write and show an alarm of a step."""
        record_alarm(self.recorder, self._progress, step, name, text)

    async def keep_groups(self, step: int, cluster: Cluster) -> None:
        """Write the groups of the last update to disk, where the config wants that."""
        if self._run.pipeline.record:
            directory = str((self._run_dir / GROUPS / f"step-{step:06d}").resolve())
            await cluster.call_learner(lambda worker: worker.save_batch.remote(directory))

    async def checkpoint(self, step: int, cluster: Cluster, stream: GroupStream, *, now: bool = False) -> None:
        """Save everything, when it is due or wanted ``now``.

        The learner's state is taken here; the groups on their way follow as they are scored, while the run goes on,
        unless this was the last step or wanted now.
        """
        last = now or step == self._run.steps
        if step % self._run.checkpoint.every and not last:
            return
        await self.saved()  # one at a time
        outcomes = (
            stream.outcomes()
        )  # at once with the facts: the ledger at that byte must know these groups, and no others
        metadata = {
            "ledger_bytes": self._ledger.position(),
            "cursor": stream.cursor.position,
            "next_group": stream.next_group,
        }
        self._saving = asyncio.create_task(self._save(step, cluster, stream, outcomes, metadata))
        await asyncio.sleep(0)  # let it take its place in the learner's queue before the next update does
        if last or self._run.pipeline.max_staleness == 0:
            await self.saved()

    async def saved(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            RunError: it could not be written; the ones before it are whole.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            await saving

    def close(self) -> None:
        """Close the files and the metrics endpoint."""
        self._ledger.close()
        self.recorder.close()

    async def _save(
        self,
        step: int,
        cluster: Cluster,
        stream: GroupStream,
        outcomes: dict[int, asyncio.Future[Outcome]],
        metadata: dict[str, Any],
    ) -> None:
        with _failures_named(step):
            directory = self._store.begin(step)
        try:
            path = str(directory.resolve())
            with _failures_named(step):
                await cluster.call_learner(lambda worker: worker.save_state.remote(path))
            settled = await self._save_groups(step, cluster, stream, outcomes, directory / GROUPS)
            metadata["groups"] = list(settled)
            metadata["failed"] = {str(i): outcome.why for i, outcome in settled.items() if isinstance(outcome, Failed)}
            with _failures_named(step):
                await _in_thread(lambda: self._finish(step, directory, metadata))
        except BaseException:
            self._store.abandon(directory)  # one that was finished has another name
            raise

    async def _save_groups(
        self,
        step: int,
        cluster: Cluster,
        stream: GroupStream,
        outcomes: dict[int, asyncio.Future[Outcome]],
        directory: Path,
    ) -> dict[int, Outcome]:
        """Write what is on its way, as soon as it is scored; what became of each group."""
        while True:
            settled = await stream.wait_outcomes(outcomes)
            groups = [outcome for outcome in settled.values() if isinstance(outcome, GroupRefs)]
            with _failures_named(step):
                lost = await _write_groups(cluster, directory, groups)
            if lost is None:
                return settled
            stream.reissue(lost)
            outcomes |= stream.outcomes(lost.group_ids)

    def _finish(self, step: int, directory: Path, metadata: Mapping[str, Any]) -> None:
        self._store.finish(step, directory, metadata)
        self._losses = 0

    async def _load_groups(self, cluster: Cluster, directory: Path) -> dict[int, Outcome]:
        """What the checkpoint says of the groups that were on their way, in their order."""
        ids = [group_id for group_id in self._groups if group_id not in self._failed]

        async def load(worker: Any) -> list[GroupRefs]:
            call = worker.load_groups.options(num_returns=1 + 2 * len(ids))
            versions, *refs = call.remote(str(directory.resolve()), ids)
            drawn = zip(ids, await versions, refs[::2], refs[1::2], strict=True)
            return [GroupRefs(i, version, tokens, scores=scores) for i, version, tokens, scores in drawn]

        groups: list[GroupRefs] = await cluster.call_learner(load) if ids else []
        ready = {group.group_id: group for group in groups}
        return {i: Failed(self._failed[i]) if i in self._failed else ready[i] for i in self._groups}

    def _go_back(self, saved: Checkpoint | None) -> None:
        metadata: Mapping[str, Any] = saved.metadata if saved else {"ledger_bytes": 0, "cursor": 0, "next_group": 0}
        self._checkpoint = saved
        self.step = saved.step if saved else 0
        self._groups: list[int] = metadata.get("groups", [])
        self._failed = {int(group_id): why for group_id, why in metadata.get("failed", {}).items()}
        self._cursor = PromptCursor(
            self._prompts, self._run.seed, self._run.prompts.shuffle, position=metadata["cursor"]
        )
        self._next_group: int = metadata["next_group"]
        for directory in (self._run_dir / GROUPS).glob("step-*"):  # other groups may be trained in these steps now
            if int(directory.name.removeprefix("step-")) > self.step:
                shutil.rmtree(directory)
        self._ledger = Ledger(self._run_dir / "ledger.jsonl", keep_bytes=metadata["ledger_bytes"])


async def _write_groups(cluster: Cluster, directory: Path, groups: Sequence[GroupRefs]) -> GroupsLostError | None:
    """Let the learner write groups; None when they are written, or which of them are gone, and then none is."""
    objects = [ref for group in groups for ref in (group.tokens, group.scores)]
    if not objects:
        return None
    try:
        await cluster.call_learner(lambda worker: worker.save_groups.remote(str(directory.resolve()), *objects))
    except ArgumentsLost:
        return GroupsLostError(await cluster.missing(groups))
    return None


@contextmanager
def _failures_named(step: int) -> Iterator[None]:
    """A disk that fails, under the driver (OSError) or the learner (RunError), fails a checkpoint: say which.

    A learner that is lost is another matter: the run goes back.
    """
    try:
        yield
    except LearnerLostError:
        raise
    except (OSError, RunError) as error:
        raise RunError(
            f"checkpoint of step {step} could not be written ({error}); the ones before it are whole"
        ) from error


async def _in_thread(work: Callable[[], object]) -> None:
    """Let a thread do it and wait to the end, also when cancelled: the thread goes on anyway, behind everyone's back.

    Raises:
        CancelledError: it was cancelled meanwhile, and the work is done.
    """
    running = asyncio.get_running_loop().run_in_executor(None, work)
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error
    running.result()
    if cancelled is not None:
        raise cancelled


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


def record_update(
    run: RunConfig, recorder: MetricsLogger, progress: Progress, step: int, steps: int, metrics: dict[str, float]
) -> None:
    """Write and show the metrics and alarms of update ``step`` of ``steps``."""
    found = alarms(metrics, run)
    recorder.step(step, {**metrics, "alarms": [name for name, _ in found]})
    progress.step(step, steps, metrics)
    for name, text in found:
        record_alarm(recorder, progress, step, name, text)


def record_alarm(recorder: MetricsLogger, progress: Progress, step: int, name: str, text: str) -> None:
    """Write and show an alarm of a step."""
    recorder.alarm(step, name, text)
    progress.alarm(name, text)
