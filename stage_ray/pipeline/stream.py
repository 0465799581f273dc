"""The stream of groups: admits, generates, scores and refills behind the learner's back."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from stage_ray.cluster.cluster import Cluster, GroupRefs, GroupsLostError, LearnerLostError
from stage_ray.config import RunConfig
from stage_ray.errors import RunError
from stage_ray.pipeline.buffer import Failed, GroupBuffer, GroupsFailedError
from stage_ray.pipeline.ledger import Event, Ledger
from stage_ray.pipeline.prompts import PromptCursor
from stage_ray.records import RolloutRequest, image_seeds

Outcome = GroupRefs | Failed
"""What becomes of a group: its scored payload, or why it cannot be scored."""


class NoValidRewardError(RunError):
    """No scorer gave a valid score to any of the last groups, before the update ``step`` (counted from 1)."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class GroupStream:
    """Keeps every free slot of the buffer busy; `next_batch` gives the groups of one update.

    In strict order waves go to the workers in turn and every group's version is settled when it is admitted; in arrival
    order they go where the queue is shortest. A group whose payload went down with a node is drawn again, as it was.

    A group that cannot be scored in ``scoring.attempts`` tries is dropped and a fresh one takes its place (promise 4);
    when more groups than two steps need failed in a row, the scorers are broken and the run stops. In arrival order the
    fresh one is drawn at once. In strict order it must not depend on when the scorers gave up: it is drawn when its
    batch is the next to train and all others of it are settled, with the version that was published last.
    """

    def __init__(
        self, cluster: Cluster, run: RunConfig, cursor: PromptCursor, ledger: Ledger, next_group: int, step: int
    ) -> None:
        self.cursor = cursor
        self.next_group = next_group
        self.step = step
        self._cluster, self._run, self._ledger = cluster, run, ledger
        pipeline = run.pipeline
        self._buffer: GroupBuffer[GroupRefs] = GroupBuffer(
            run.rollout.groups_per_step, pipeline.max_staleness, pipeline.order
        )
        self._requests: dict[int, RolloutRequest] = {}  # of the groups in the buffer, to draw one again
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failed_in_a_row = 0
        self._waves = 0
        self._counts = {"scoring/rescored": 0.0, "scoring/replaced": 0.0, "rollout/reissued": 0.0}
        self._times = {"time/rollout_s": 0.0, "time/score_s": 0.0}
        self._looked = time.perf_counter()

    async def __aenter__(self) -> GroupStream:
        self._cluster.busy()  # what they did before, an evaluation for instance, is not the first step's
        self._admit()
        if self._run.pipeline.order == "arrival":
            self._replace(self._buffer.failed)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._failure.cancel()

    def restore(self, outcomes: Mapping[int, Outcome]) -> None:
        """Put a checkpoint's groups back into their slots, in their order; before `__aenter__`."""
        done = self._ledger.open_groups()
        for group_id, outcome in outcomes.items():
            if isinstance(outcome, Failed):
                self._buffer.admit(group_id, self.step)
                self._buffer.fail(group_id, outcome.why)
                continue
            self._buffer.admit(group_id, outcome.policy_version)  # its age counts from there, not from the resume
            missing: list[Event] = ["generated", "scored"]
            for event in missing[{"generated": 1, "scored": 2}.get(done[group_id], 0) :]:
                self._ledger.note(event, [group_id], step=self.step, policy_version=outcome.policy_version)
            self._buffer.ready(group_id, outcome, outcome.policy_version)

    async def next_batch(self) -> list[GroupRefs]:
        """The groups of one update, in the learner's hands, as soon as all are ready.

        Raises:
            LearnerLostError: it died, or lost a group that only its checkpoint can give back.
            RunError: a worker or every scorer (`NoValidRewardError`) failed behind our back.
        """
        while True:
            try:
                groups = [payload for _, payload in await self._unless_failed(self._buffer.take(self.step))]
                await self._cluster.set_batch(groups)
                return groups
            except GroupsFailedError as failed:
                self._replace(failed.reasons)
            except GroupsLostError as lost:
                self.reissue(lost)
                self._buffer.requeue(group.group_id for group in groups)

    def reissue(self, lost: GroupsLostError, *, scored: bool = True) -> None:
        """Draw groups whose payload is gone again: the same prompts and seeds, by whatever version is served now.

        Args:
            lost: which.
            scored: they were in the buffer; one that is there no more is being drawn again already.

        Raises:
            LearnerLostError: a group that came from a checkpoint, so that nobody knows how it was drawn.
        """
        unknown = [group_id for group_id in lost.group_ids if group_id not in self._requests]
        if unknown:
            raise LearnerLostError(f"group {unknown[0]} of the checkpoint went down with a node")
        ids = [group_id for group_id in lost.group_ids if self._buffer.invalidate(group_id) or not scored]
        requests = [self._requests[group_id] for group_id in ids]
        self._counts["rollout/reissued"] += len(requests)
        self._ledger.note("reissued", ids, step=self.step)
        if requests:
            self._spawn(self._generate(requests))

    def outcomes(self, group_ids: Iterable[int] | None = None) -> dict[int, asyncio.Future[Outcome]]:
        """What becomes of groups, or of all admitted and not trained; `wait_outcomes` waits for it.

        Which groups is settled by this call, and all later fortunes of their slots do not matter.
        """
        return self._buffer.outcomes(group_ids)

    async def wait_outcomes(self, outcomes: Mapping[int, asyncio.Future[Outcome]]) -> dict[int, Outcome]:
        """What became of groups, once all of them are scored or cannot be."""

        async def wait() -> dict[int, Outcome]:
            return {group_id: await outcome for group_id, outcome in outcomes.items()}

        found: dict[int, Outcome] = await self._unless_failed(wait())
        return found

    def mark_trained(self, groups: Sequence[GroupRefs], step: int) -> None:
        """Write into the ledger that an update took these groups; their slots stay held until `free_slots`.

        Raises:
            RunError: one is older than ``pipeline.max_staleness`` allows, or newer than the learner.
        """
        bound = self._run.pipeline.max_staleness
        for group in groups:
            age = step - group.policy_version
            if not 0 <= age <= bound:
                raise RunError(f"group {group.group_id} is {age} versions old, pipeline.max_staleness is {bound}")
        for group in groups:
            self._ledger.note("trained", [group.group_id], step=step, policy_version=group.policy_version)

    def free_slots(self, groups: Sequence[GroupRefs]) -> None:
        """Give the slots of trained groups to new ones, which are drawn with the version that was published last."""
        self.step += 1
        for group in groups:
            self._requests.pop(group.group_id, None)
        self._buffer.free_slots(group.group_id for group in groups)
        self._admit()

    def metrics(self) -> dict[str, float]:
        """Counters, depths of the queues, and busy seconds and shares of the roles since the last call."""
        now = time.perf_counter()
        elapsed, self._looked = now - self._looked, now
        members = self._cluster.workers()
        busy = {f"busy/{role}": s / elapsed / max(1, members[role]) for role, s in self._cluster.busy().items()}
        pools = {f"workers/{role}": float(members[role]) for role in ("rollout", "reward")}
        depths = {"queue/pending": float(self._buffer.pending), "queue/ready": float(self._buffer.waiting)}
        metrics = (
            self._counts | self._times | busy | depths | pools | {"workers/restarts": float(self._cluster.restarts())}
        )
        self._counts = dict.fromkeys(self._counts, 0.0)
        self._times = dict.fromkeys(self._times, 0.0)
        return metrics

    def _admit(self) -> None:
        """Fill the free slots."""
        while (count := min(self._buffer.free, self._run.rollout.groups_per_step)) > 0:  # a wave spans no two batches
            requests = [self._request() for _ in range(count)]
            for request in requests:
                self._buffer.admit(request.group_id, self.step)
            self._draw(requests)

    def _draw(self, requests: Sequence[RolloutRequest]) -> None:
        """Send out new groups in waves, shared evenly among the rollout workers."""
        self._ledger.note("admitted", [request.group_id for request in requests], step=self.step)
        rollout = self._run.rollout
        # In strict order the cut into waves, which bits depend on, must not depend on who happens to be there.
        workers = rollout.workers if self._run.pipeline.order == "strict" else self._cluster.workers()["rollout"]
        largest = max(1, rollout.images_per_batch // rollout.group_size)
        size = min(largest, math.ceil(len(requests) / max(1, workers)))
        for start in range(0, len(requests), size):
            self._spawn(self._generate(requests[start : start + size]))

    async def _generate(self, requests: Sequence[RolloutRequest]) -> None:
        ids = [request.group_id for request in requests]

        def reissued() -> None:
            self._counts["rollout/reissued"] += len(ids)
            self._ledger.note("reissued", ids, step=self.step)

        turn = self._waves if self._run.pipeline.order == "strict" else None
        self._waves += 1
        receipt, groups = await self._cluster.generate(requests, turn=turn, on_retry=reissued)
        self._times["time/rollout_s"] += receipt.generate_s
        self._ledger.note("generated", ids, step=self.step, policy_version=receipt.policy_version)
        size = self._run.scoring.groups_per_call
        for start in range(0, len(groups), size):
            self._spawn(self._score(groups[start : start + size]))

    async def _score(self, groups: Sequence[GroupRefs]) -> None:
        pending = list(groups)
        errors: dict[int, str] = {}
        attempt = 0
        while pending and attempt < self._run.scoring.attempts:
            self._counts["scoring/rescored"] += len(pending) if attempt else 0
            start = time.perf_counter()
            try:
                results = await self._cluster.score(pending)
            except GroupsLostError as lost:
                self.reissue(lost, scored=False)
                pending = [group for group in pending if group.group_id not in lost.group_ids]
                continue
            attempt += 1
            self._times["time/score_s"] += time.perf_counter() - start
            for receipt, group in results:
                if receipt.ok:
                    self._failed_in_a_row = 0
                    self._ledger.note("scored", [group.group_id], step=self.step, policy_version=group.policy_version)
                    bare = GroupRefs(group.group_id, group.policy_version, group.tokens, scores=group.scores)
                    self._buffer.ready(group.group_id, bare, group.policy_version)
            errors = {receipt.group_id: receipt.error for receipt, _ in results if not receipt.ok}
            pending = [group for receipt, group in results if not receipt.ok]
        if pending:
            self._fail(errors)

    def _fail(self, reasons: Mapping[int, str]) -> None:
        """No scorer could score these groups: their slots wait for fresh ones."""
        self._failed_in_a_row += len(reasons)
        if self._failed_in_a_row > 2 * self._run.rollout.groups_per_step:
            why = next(iter(reasons.values()))
            text = f"{self._failed_in_a_row} groups in a row could not be scored; the last one: {why}"
            raise NoValidRewardError(text, self.step + 1)
        for group_id, why in reasons.items():
            self._buffer.fail(group_id, why)
        if self._run.pipeline.order == "arrival":
            self._replace(reasons)

    def _replace(self, reasons: Mapping[int, str]) -> None:
        """Drop groups that failed; fresh ones take their slots, in their order."""
        self._counts["scoring/replaced"] += len(reasons)
        for group_id, why in reasons.items():
            self._ledger.note("dropped", [group_id], step=self.step, why=why)
            self._requests.pop(group_id, None)
        requests = [self._request() for _ in reasons]
        for group_id, request in zip(reasons, requests, strict=True):
            self._buffer.replace(group_id, request.group_id)
        if requests:
            self._draw(requests)

    def _request(self) -> RolloutRequest:
        group_id, self.next_group = self.next_group, self.next_group + 1
        seeds = image_seeds(self._run.seed, group_id, self._run.rollout.group_size)
        self._requests[group_id] = RolloutRequest(group_id, self.cursor.draw(), seeds)
        return self._requests[group_id]

    async def _unless_failed(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Its result, or the error of whatever failed behind our back meanwhile."""
        task = asyncio.ensure_future(work)
        either: list[asyncio.Future[Any]] = [task, self._failure]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            self._failure.result()
        return task.result()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failure.done():
            self._failure.set_exception(error)
