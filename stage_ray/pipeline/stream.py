"""The stream of groups: every free slot of the buffer is kept busy while the learner trains."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from stage_ray.config import RunConfig
from stage_ray.errors import GroupsLostError, LearnerLostError, RunError
from stage_ray.pipeline.buffer import Failed, GroupBuffer, Slot, failures
from stage_ray.pipeline.ledger import Event, Ledger
from stage_ray.pipeline.prompts import PromptCursor
from stage_ray.records import GroupRefs, RolloutRequest, drawn_unguided, image_seeds
from stage_ray.samplers import training_search

if TYPE_CHECKING:
    from stage_ray.cluster.cluster import Cluster

Outcome = GroupRefs | Failed  # what becomes of a group: its scored payload, or why it is not trained
SILENT = "no scorer told its images apart"

Result = TypeVar("Result")
# What is counted from one call of `GroupStream.metrics` to the next.
COUNTED = (
    *("scoring/rescored", "scoring/replaced", "rollout/redrawn", "rollout/reissued"),
    *("time/rollout_s", "time/score_s"),
)


class NoValidRewardError(RunError):
    """No scorer gave a valid score to any of the last groups, before the update ``step`` (counted from 1)."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class GroupStream:
    """A group's trip: admitted into a slot, generated, scored, taken for an update, marked as trained, released.

    In strict order generation batches go to the workers in turn, and a group's version is fixed when it is admitted;
    in arrival order they go where the queue is shortest. A group whose payload is lost with a node is generated again
    from the same prompt and seeds.

    A group that cannot be scored in ``scoring.attempts`` tries, or whose records are not finite in ``cluster.attempts``
    tries, is dropped and a fresh one takes its slot (promise 4); when more groups than two steps need failed in a row,
    the scorers (or the engines) are broken and the run stops. In arrival order the fresh group is admitted at once. In
    strict order it must not depend on when the scorers gave up: it is admitted when its batch is the next to train and
    all others of it are settled, with the version that was published last.

    So is a group whose images all scored the same, if ``algorithm.redraw_silent`` allows: so many times a slot, then
    the group is trained as it is.

    Attributes:
        cursor: draws the prompts.
        next_group: id of the next group to admit.
        step: updates whose groups were released.
        redrawn: how often the slot of a group was redrawn because the groups before it were silent, where it was.
    """

    def __init__(
        self, cluster: Cluster, run: RunConfig, cursor: PromptCursor, ledger: Ledger, next_group: int, step: int
    ) -> None:
        self.cursor, self.next_group, self.step = cursor, next_group, step
        self.redrawn: dict[int, int] = {}
        self._cluster, self._ledger = cluster, ledger
        self._seed, self._rollout, self._attempts = run.seed, run.rollout, run.scoring.attempts
        self._groups_per_call = max(pool.groups_per_call for pool in run.scoring_pools)  # a pool may take fewer
        self._redraw_silent = run.algorithm.redraw_silent
        self._search = training_search(run)  # whose candidates are drawn and scored; the learner keeps the chosen ones
        self._max_staleness, self._strict = run.pipeline.max_staleness, run.pipeline.order == "strict"
        self._buffer: GroupBuffer[GroupRefs] = GroupBuffer(
            run.rollout.groups_per_step, run.pipeline.max_staleness, run.pipeline.order
        )
        self._requests: dict[int, RolloutRequest] = {}  # of the groups in the buffer, to generate one again
        self._failed_in_a_row = 0
        self._batches = 0  # sent to the rollout workers so far
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # of the first task that fails
        self._numbers = dict.fromkeys(COUNTED, 0.0)
        self._utilised: list[tuple[float, float]] = []  # seconds and MFU of each generation batch since the last call
        self._measured = time.perf_counter()

    async def __aenter__(self) -> GroupStream:
        self._cluster.busy()  # reset: earlier work, such as an evaluation, does not count for the first step
        self._admit()
        if not self._strict:
            self._replace(self._buffer.failed)
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._failure.cancel()

    def restore(self, outcomes: Mapping[int, Outcome], redrawn: Mapping[int, int] | None = None) -> None:
        """Put a checkpoint's groups back into their slots, in their order; before `__aenter__`."""
        self.redrawn = dict(redrawn or {})
        last_events = self._ledger.open_groups()
        for group_id, outcome in outcomes.items():
            if isinstance(outcome, Failed):
                self._buffer.admit(group_id, self.step)
                self._buffer.fail(group_id, outcome.why)
                continue
            version = outcome.policy_version
            self._buffer.admit(group_id, version)  # its age counts from there, not from the resume
            if last_events[group_id] not in ("generated", "scored"):
                self._note("generated", [group_id], version)
            if last_events[group_id] != "scored":
                self._note("scored", [group_id], version)
            self._buffer.ready(group_id, outcome, version)

    async def next_batch(self) -> list[GroupRefs]:
        """The groups of the next update, as soon as all of them are ready.

        Raises:
            RunError: a worker or every scorer (`NoValidRewardError`) failed since the last call.
        """
        while True:
            batch = await self._unless_failed(self._buffer.take(self.step))
            if not (failed := failures(batch)):
                return [outcome for _, outcome in batch if isinstance(outcome, GroupRefs)]  # which all of them are
            self._replace(failed)

    def requeue(self, groups: Iterable[GroupRefs], lost: GroupsLostError) -> None:
        """Take back the groups of `next_batch` that no update took, since some were ``lost``; raises as `reissue`."""
        self.reissue(lost)
        self._buffer.requeue(group.group_id for group in groups)

    def mark_trained(self, groups: Sequence[GroupRefs], step: int) -> None:
        """Write into the ledger that update ``step`` (0-based) took these groups; slots stay held until `release`.

        Raises:
            RunError: one is older than ``pipeline.max_staleness`` allows, or newer than the learner.
        """
        for group in groups:
            age = step - group.policy_version
            if not 0 <= age <= self._max_staleness:
                raise RunError(
                    f"group {group.group_id} is {age} versions old, pipeline.max_staleness is {self._max_staleness}"
                )
        for group in groups:
            self._ledger.note("trained", [group.group_id], step=step, policy_version=group.policy_version)

    def metrics(self) -> dict[str, float]:
        """Counters and busy shares of the roles since the last call, and depths of the queues."""
        now = time.perf_counter()
        elapsed, self._measured = now - self._measured, now
        workers = self._cluster.workers()
        numbers, self._numbers = self._numbers, dict.fromkeys(COUNTED, 0.0)
        numbers |= {f"busy/{role}": s / elapsed / max(1, workers[role]) for role, s in self._cluster.busy().items()}
        if utilised := sum(seconds for seconds, _ in self._utilised):
            numbers["mfu/rollout"] = sum(seconds * mfu for seconds, mfu in self._utilised) / utilised
        self._utilised = []
        numbers |= {"queue/pending": float(self._buffer.pending), "queue/ready": float(self._buffer.waiting)}
        numbers |= {f"workers/{role}": float(workers[role]) for role in ("rollout", "reward")}
        return numbers | {"workers/restarts": float(self._cluster.restarts())}

    def release(self, groups: Iterable[GroupRefs]) -> None:
        """Give the slots of trained groups to new ones, which are generated by the version that was published last."""
        self.step += 1
        group_ids = [group.group_id for group in groups]
        for group_id in group_ids:
            self._requests.pop(group_id, None)
            self.redrawn.pop(group_id, None)
        self._buffer.free_slots(group_ids)
        self._admit()

    def held(self) -> list[Slot[GroupRefs]]:
        """The groups that are admitted and not taken now, in their order, to wait for with `outcomes`."""
        return self._buffer.held()

    async def outcomes(self, slots: Sequence[Slot[GroupRefs]]) -> dict[int, Outcome]:
        """What became of the groups of `held`, once every one is scored or cannot be; raises as `next_batch` does."""
        return await self._unless_failed(self._buffer.outcomes(slots))

    def reissue(self, lost: GroupsLostError, *, scored: bool = True) -> None:
        """Generate groups whose payload is lost again: the same prompts and seeds, by the version that is served now.

        Args:
            lost: which.
            scored: they were ready; one that no longer is has been reissued already.

        Raises:
            LearnerLostError: a group came from a checkpoint, so only that can give it back.
        """
        unknown = [group_id for group_id in lost.group_ids if group_id not in self._requests]
        if unknown:
            raise LearnerLostError(f"group {unknown[0]} of the checkpoint went down with a node")
        ids = [group_id for group_id in lost.group_ids if self._buffer.invalidate(group_id) or not scored]
        self._count_reissued(ids)
        if ids:
            self._spawn(self._generate([self._requests[group_id] for group_id in ids]))

    # A group's trip from its slot to the buffer, in order.

    def _admit(self) -> None:
        """Fill the free slots. No generation batch spans the groups of two updates."""
        while (count := min(self._buffer.free, self._rollout.groups_per_step)) > 0:
            requests = [self._next_request() for _ in range(count)]
            for request in requests:
                self._buffer.admit(request.group_id, self.step)
            self._send(requests)

    def _next_request(self) -> RolloutRequest:
        group_id, self.next_group = self.next_group, self.next_group + 1
        seeds = image_seeds(self._seed, group_id, self._rollout.group_size)
        guided = not drawn_unguided(group_id, self._rollout.unguided_share)
        request = RolloutRequest(group_id, self.cursor.draw(), seeds, guided)
        self._requests[group_id] = request if self._search is None else self._search.widen(request)
        return self._requests[group_id]

    def _send(self, requests: Sequence[RolloutRequest]) -> None:
        """Cut new requests into generation batches, shared evenly among the rollout workers, and send them."""
        self._note("admitted", [request.group_id for request in requests])
        # Bits depend on the cut; so in strict order it must not depend on which workers are alive.
        workers = self._rollout.workers if self._strict else self._cluster.workers()["rollout"]
        largest = max(1, self._rollout.images_per_batch // len(requests[0].seeds))
        size = min(largest, math.ceil(len(requests) / max(1, workers)))
        for start in range(0, len(requests), size):
            self._spawn(self._generate(requests[start : start + size]))

    async def _generate(self, requests: Sequence[RolloutRequest]) -> None:
        ids = [request.group_id for request in requests]
        turn = self._batches if self._strict else None
        self._batches += 1
        groups = await self._cluster.generate(requests, turn=turn, on_retry=lambda: self._count_reissued(ids))
        seconds, mfu = groups[0].generate_s, groups[0].mfu  # of the whole batch, which one version generated
        self._numbers["time/rollout_s"] += seconds
        if mfu is not None:
            self._utilised.append((seconds, mfu))
        self._note("generated", ids, groups[0].policy_version)
        self._fail([group for group in groups if group.error])
        groups = [group for group in groups if not group.error]
        size = self._groups_per_call
        for start in range(0, len(groups), size):
            self._spawn(self._score(groups[start : start + size]))

    async def _score(self, groups: Sequence[GroupRefs]) -> None:
        pending, attempt = list(groups), 0
        while pending and attempt < self._attempts:
            self._numbers["scoring/rescored"] += len(pending) if attempt else 0
            start = time.perf_counter()
            try:
                scored = await self._cluster.score(pending)
            except GroupsLostError as lost:  # no group was scored: the others are asked for again
                self.reissue(lost, scored=False)
                pending = [group for group in pending if group.group_id not in lost.group_ids]
                continue
            attempt += 1
            self._numbers["time/score_s"] += time.perf_counter() - start
            for group in scored:
                if not group.error:
                    self._failed_in_a_row = 0
                    self._note("scored", [group.group_id], group.policy_version)
                    if group.silent and self.redrawn.get(group.group_id, 0) < self._redraw_silent:
                        self._give_up({group.group_id: SILENT})
                        continue
                    # Without the pictures, so that Ray can free them.
                    self._buffer.ready(group.group_id, replace(group, images=None), group.policy_version)
            pending = [group for group in scored if group.error]
        self._fail(pending)

    def _fail(self, groups: Sequence[GroupRefs]) -> None:
        """Give groups up that are not finite or cannot be scored, for the reason in their ``error``."""
        self._failed_in_a_row += len(groups)
        if groups and self._failed_in_a_row > 2 * self._rollout.groups_per_step:
            text = f"{self._failed_in_a_row} groups in a row could not be scored; the last one: {groups[0].error}"
            raise NoValidRewardError(text, self.step + 1)
        self._give_up({group.group_id: group.error for group in groups})

    def _give_up(self, reasons: Mapping[int, str]) -> None:
        """Mark groups that are not to be trained; in strict order they wait for their batch."""
        for group_id, why in reasons.items():
            self._buffer.fail(group_id, why)
        if not self._strict:
            self._replace(reasons)

    def _replace(self, reasons: Mapping[int, str]) -> None:
        """Drop groups that are not to be trained; fresh ones take their slots, in their order."""
        for group_id, why in reasons.items():
            self._numbers["rollout/redrawn" if why == SILENT else "scoring/replaced"] += 1
            self._ledger.note("dropped", [group_id], step=self.step, why=why)
            self._requests.pop(group_id, None)
        requests = [self._next_request() for _ in reasons]
        for group_id, request in zip(reasons, requests, strict=True):
            self._buffer.replace(group_id, request.group_id)
            if redrawn := self.redrawn.pop(group_id, 0) + (reasons[group_id] == SILENT):
                self.redrawn[request.group_id] = redrawn
        if requests:
            self._send(requests)

    def _count_reissued(self, group_ids: Sequence[int]) -> None:
        self._numbers["rollout/reissued"] += len(group_ids)
        self._note("reissued", group_ids)

    def _note(self, event: Event, group_ids: Iterable[int], policy_version: int | None = None) -> None:
        self._ledger.note(event, group_ids, step=self.step, policy_version=policy_version)

    # Tasks beside the training loop; the first error reaches the loop where it waits. Unlike in an `asyncio.TaskGroup`
    # an error cancels nothing: an update or a save under way is finished first.

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def _unless_failed(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of ``work``, or the error of the first task that failed, before or meanwhile."""
        task = asyncio.ensure_future(work)
        either: list[asyncio.Future[Any]] = [task, self._failure]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            self._failure.result()  # raises the error
        return task.result()
