"""The state of a run: what a checkpoint holds and a resume goes on from (promise 8)."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stage_ray.config import RunConfig
from stage_ray.errors import GroupsLostError, LearnerLostError, RunError
from stage_ray.observability.metrics_logger import METRICS_FILE, read_steps
from stage_ray.pipeline.buffer import Failed, Slot, failures
from stage_ray.pipeline.ledger import Ledger
from stage_ray.pipeline.prompts import PromptCursor
from stage_ray.pipeline.stream import GroupStream, Outcome
from stage_ray.records import GroupRefs, Prompt
from stage_ray.run.checkpoint import Checkpoint, CheckpointError, CheckpointStore, best_of, verify
from stage_ray.run.recording import GROUPS

if TYPE_CHECKING:
    from stage_ray.cluster.cluster import Cluster

LEARNER_LIVES = 3


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands, as the metadata of a checkpoint."""

    ledger_bytes: int = 0  # length of the ledger; a resume cuts it back to that
    cursor: int = 0  # prompts drawn so far
    next_group: int = 0  # id of the next group to admit
    groups: Sequence[int] = ()  # ids of the groups that were on their way, in the order of their slots
    failed: Mapping[str, str] = field(default_factory=dict)  # those that are not to be trained (id as text) and why
    redrawn: Mapping[str, int] = field(default_factory=dict)  # `GroupStream.redrawn` of ``groups``


class RunState:
    """Learner, prompt cursor, ledger and the groups on their way, saved and restored together.

    Attributes:
        step: updates that the newest whole checkpoint holds; 0 without one.
        best: updates of the model that `export_best` has written; None without one.
    """

    def __init__(
        self, run: RunConfig, run_dir: Path, prompts: list[Prompt], *, resume: bool, note: Callable[[str], None]
    ) -> None:
        self._run, self._prompts, self._note = run, prompts, note
        self._ledger_file = run_dir / "ledger.jsonl"
        self._store = CheckpointStore(run_dir / "checkpoints", run.checkpoint.keep)
        self._saving: asyncio.Task[None] | None = None
        self._losses = 0
        self.best: int | None = None
        saved = self._store.latest(note) if resume else None
        if resume and saved is None:
            _require_unsaved(run_dir, run.checkpoint.every)
        self._go_back(saved)

    def rewind(self, lost: RunError) -> None:
        """Go back to the newest checkpoint: the learner lost all that came after it.

        Raises:
            RunError: ``lost`` itself, when it happened `LEARNER_LIVES` times without a new checkpoint between.
        """
        saved = self._store.latest(self._note)
        self._losses = self._losses + 1 if saved == self._checkpoint else 1  # the first since a new checkpoint
        if self._losses >= LEARNER_LIVES:
            raise RunError(f"the learner was lost {self._losses} times since step {self.step}; {lost}") from lost
        self._ledger.close()
        self._go_back(saved)

    async def restore(self, cluster: Cluster) -> None:
        """Give the learner the checkpoint's state and every rollout worker its weights; may raise LearnerLostError."""
        cluster.learner.accept()
        if self._checkpoint is not None:
            await cluster.learner.load_state(self._checkpoint.path)
            self._note(f"going on after step {self.step} from {self._checkpoint.path}")
        if self._checkpoint is not None or cluster.published:
            await cluster.publish(self.step)

    @asynccontextmanager
    async def stream(self, cluster: Cluster) -> AsyncIterator[GroupStream]:
        """The stream from here on, the checkpoint's groups in their old places; at its end nothing is being saved."""
        at, prompts = self._position, self._run.prompts
        weights = [file.weight for file in prompts.files.values()]
        cursor = PromptCursor(self._prompts, self._run.seed, prompts.shuffle, position=at.cursor, weights=weights)
        stream = GroupStream(cluster, self._run, cursor, self._ledger, at.next_group, step=self.step)
        if self._checkpoint is not None:
            ready = [group_id for group_id in at.groups if str(group_id) not in at.failed]  # the others have no payload
            loaded = await cluster.learner.load_groups(self._checkpoint.path / GROUPS, ready)
            outcomes: dict[int, Outcome] = {int(group_id): Failed(why) for group_id, why in at.failed.items()}
            outcomes |= {group.group_id: group for group in loaded}
            in_order = {group_id: outcomes[group_id] for group_id in at.groups}  # of their slots
            stream.restore(in_order, {int(group_id): times for group_id, times in at.redrawn.items()})
        async with stream:
            try:
                yield stream
            finally:
                if self._saving is not None:
                    self._saving.cancel()  # does nothing to one that has ended
                    await asyncio.gather(self._saving, return_exceptions=True)
                    self._saving = None

    async def checkpoint(self, step: int, cluster: Cluster, stream: GroupStream, *, now: bool = False) -> None:
        """Save everything after update ``step``, when it is due, the best so far, or wanted ``now``.

        The learner's state is taken here; the groups on their way follow as they are scored, while the run goes on,
        unless this was the last step or wanted now.
        """
        last = now or step == self._run.steps
        if step % self._run.checkpoint.every and not last and step != best_of(self._store.scores):
            return
        await self.saved()  # one at a time
        # Without an await between: the ledger at that byte must have these very groups open.
        held = stream.held()
        ids = [slot.group_id for slot in held]
        redrawn = {str(group_id): stream.redrawn[group_id] for group_id in ids if group_id in stream.redrawn}
        position = Position(self._ledger.position(), stream.cursor.position, stream.next_group, redrawn=redrawn)
        self._saving = asyncio.create_task(self._save(step, cluster, stream, held, position))
        await asyncio.sleep(0)  # queues `save_state` at the learner before the next update
        if last or self._run.pipeline.max_staleness == 0:
            await self.saved()

    async def saved(self) -> None:
        """Wait for the checkpoint that is being written; a RunError where that failed."""
        if self._saving is not None:
            await self._saving

    def rate(self, scores: Mapping[int, float]) -> None:
        """Keep the best checkpoint by the ``scores`` of steps, whatever ``checkpoint.keep`` says."""
        self._store.scores = {step: score for step, score in scores.items() if step}  # 0: no checkpoint

    async def export_best(self, cluster: Cluster, directory: Path) -> None:
        """Export the best checkpoint that is whole, if any, after the last step, and remove older ones."""
        if (step := self._store.best()) is None:
            return
        self._store.prune(self._run.steps)
        if step != self._run.steps:
            path = self._store.path(step)
            try:
                await asyncio.to_thread(verify, path, step)
            except CheckpointError as error:
                self._note(f"the best step, {step}, is not exported: {error}")
                return
            await cluster.learner.load_state(path)
        await cluster.learner.export(directory)
        self.best = step

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    async def _save(
        self, step: int, cluster: Cluster, stream: GroupStream, held: list[Slot[GroupRefs]], position: Position
    ) -> None:
        """Write the learner's state, then the ``held`` groups once they are scored, then all the rest."""
        with _failures_named(step):
            directory = self._store.begin(step)
        try:
            with _failures_named(step):
                written = await cluster.learner.save_state(directory)
            while True:
                found = await stream.outcomes(held)
                ready = [outcome for outcome in found.values() if isinstance(outcome, GroupRefs)]
                try:
                    with _failures_named(step):
                        await cluster.learner.save_groups(directory / GROUPS, ready)
                    break
                except GroupsLostError as lost:  # none was written
                    taken = set(lost.group_ids) - {slot.group_id for slot in stream.held()}
                    if taken:  # by an update since then, so they are not generated again
                        self._note(
                            f"the checkpoint of step {step} is given up: a node was lost, and with it group "
                            f"{min(taken)}, which a later update has taken; the ones before it stay"
                        )
                        shutil.rmtree(directory, ignore_errors=True)
                        return
                    stream.reissue(lost)
            failed = {str(group_id): why for group_id, why in failures(found.items()).items()}
            metadata = asdict(replace(position, groups=list(found), failed=failed))
            with _failures_named(step):
                await _in_thread(lambda: self._store.finish(step, directory, metadata, written))
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)  # a finished one has been renamed
            raise

    def _go_back(self, saved: Checkpoint | None) -> None:
        self._checkpoint = saved
        self.step = saved.step if saved else 0
        self._position = Position(**saved.metadata) if saved else Position()
        self._ledger = Ledger(self._ledger_file, keep_bytes=self._position.ledger_bytes)


def _require_unsaved(run_dir: Path, every: int) -> None:
    """Raise a RunError where a run had a checkpoint and none can be read: it would begin anew, over its own record.

    One that was killed before its first checkpoint begins anew and loses nothing that the kill had not. A second one is
    begun only when the first is whole.
    """
    rows = read_steps(run_dir / METRICS_FILE)
    done, made = rows[-1]["step"] if rows else 0, list((run_dir / "checkpoints").glob("step-*"))
    if made or done > 2 * every:
        where = f"of the {len(made)} in {run_dir / 'checkpoints'}" if made else f"in {run_dir / 'checkpoints'}"
        raise RunError(
            f"{done} steps were done, and no checkpoint {where} can be read; nothing was changed. Bring one back, or "
            "begin anew in another --run-dir"
        )


@contextmanager
def _failures_named(step: int) -> Iterator[None]:
    """Name the checkpoint that a disk failed, of the driver (OSError) or the learner (RunError), unless it was lost."""
    try:
        yield
    except LearnerLostError:
        raise
    except (OSError, RunError) as error:
        what = f"checkpoint of step {step} could not be written ({error})"
        raise RunError(f"{what}; the ones before it are whole") from error


async def _in_thread(work: Callable[[], object]) -> None:
    """Run ``work`` in a thread and wait for its end, also when cancelled: a thread cannot be stopped."""
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
