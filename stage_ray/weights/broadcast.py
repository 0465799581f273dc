"""Every rollout worker gets a version at once, over a line of processes: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import operator
import time
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from stage_ray.actors.supervised import SupervisedActor, WorkerLost, in_time
from stage_ray.config import ClusterConfig
from stage_ray.errors import LearnerLostError
from stage_ray.weights.broadcast_group import Backend, GroupMember
from stage_ray.weights.object_store import CallLearner, ObjectStore, taken

log = logging.getLogger(__name__)
Result = TypeVar("Result")
GRACE_S = 15.0
"""Members of a line give up by themselves after `Place.timeout_s`, twice if they have to connect; then so long."""


class Broadcast:
    """The learner and all workers that can be asked meet when each one's turn has come, and only then begin.

    So nobody sits in a transfer for a member that still draws a wave or has died, and who takes part is known: a line
    is built again whenever that changes. One that breaks costs nobody the old version; who did not get the new one
    takes it from the object store, as does a worker that starts between two versions. The learner fills the store when
    somebody needs it, and only until its next update: after that a newcomer waits for the version which that makes.
    """

    def __init__(
        self, cluster: ClusterConfig, backend: Backend, learner: SupervisedActor, call_learner: CallLearner
    ) -> None:
        self._backend, self._timeout_s = backend, cluster.sync_timeout_s
        self._learner, self._ask_learner = learner, call_learner
        self._store = ObjectStore(call_learner, self._timeout_s)
        self._version: int | None = None
        self._meeting = _Meeting([])
        self._passing: asyncio.Task[None] | None = None
        self._superseded = asyncio.Event()
        self._members: list[Any] = []
        self._address, self._number = "", 0

    @property
    def version(self) -> int | None:
        """The newest version, None before the first `publish`."""
        return self._version

    async def publish(self, seats: Sequence[SupervisedActor]) -> None:
        """Let the learner wait for the workers, and send when all are there."""
        manifest = await self._ask_learner(lambda learner: learner.offer.remote())
        self._store.published = None
        if any(seat.started and not seat.is_ready for seat in seats):
            await self._ask_learner(self._store.store)
        self._version = manifest.version
        self._meeting = _Meeting([seat for seat in seats if seat.is_ready])
        self._passing = asyncio.create_task(self._pass(self._meeting, manifest))
        self._superseded.set()
        self._superseded = asyncio.Event()

    async def load(self, seat: SupervisedActor) -> int | None:
        """Let a seat's actor take part when it is its turn."""
        meeting = self._meeting
        if seat not in meeting.missing:  # it was not ready when the others were called, so that the store has it
            return await seat.call(functools.partial(self._newest, seat.name), None, if_ready=True)
        try:
            version = await seat.call(functools.partial(self._take_part, meeting, seat), None, if_ready=True)
            seat.busy_s -= meeting.waited(seat)
            return version
        finally:
            meeting.leave(seat)

    def newest(self, name: str, worker: Any) -> Awaitable[int] | None:
        """Bring the newest version to an actor that just started, if there is one."""
        return None if self._version is None else self._newest(name, worker)

    async def settled(self) -> None:
        """Wait until the learner has sent."""
        passing, self._passing = self._passing, None
        if passing is not None:
            with contextlib.suppress(LearnerLostError):  # whoever asks the learner next is told
                await passing

    async def _newest(self, name: str, worker: Any) -> int:
        while self._store.version != self._version:
            superseded = self._superseded
            if not await self._store_in_time():
                await superseded.wait()
        return await self._from_store(name, worker)

    async def _store_in_time(self) -> bool:
        """Whether the learner still had the newest version when it was asked to store it."""

        async def store(learner: Any) -> bool:
            if self._store.version != self._version and await learner.version.remote() == self._version:
                await self._store.store(learner)
            return self._store.version == self._version

        try:
            return bool(await self._ask_learner(store))
        except LearnerLostError:
            return False

    async def _from_store(self, name: str, worker: Any) -> int:
        loading = self._store.newest(name, worker)
        assert loading is not None, "nothing was stored"
        return await loading

    async def _take_part(self, meeting: _Meeting, seat: SupervisedActor, worker: Any) -> int | None:
        passed = await meeting.arrive(seat, worker)
        if passed is None:
            return None
        return self._version if passed else await self._from_store(seat.name, worker)

    async def _pass(self, meeting: _Meeting, manifest: Any) -> None:
        """Hold the learner until every worker is here or lost, then let the version go from one to the others."""

        async def send(learner: Any) -> None:
            meeting.came[self._learner] = time.perf_counter()
            await meeting.complete.wait()
            meeting.began = time.perf_counter()
            if meeting.arrived:
                await self._send(learner, meeting, manifest)

        try:
            await self._ask_learner(send, patient=True)
            self._learner.busy_s -= meeting.waited(self._learner)
        finally:
            meeting.end()

    async def _send(self, learner: Any, meeting: _Meeting, manifest: Any) -> None:
        workers = [worker for worker, _ in meeting.arrived.values()]
        members = await self._group_members(learner, workers)
        limit = 2 * self._timeout_s + GRACE_S
        sending = _within(learner.send.remote(members[0]), limit, "the learner")
        receiving = [
            taken(worker.receive.remote(manifest, member), seat.name, manifest.version, self._timeout_s, limit)
            for seat, worker, member in zip(meeting.arrived, workers, members[1:], strict=True)
        ]
        sent, *received = await asyncio.gather(sending, *receiving, return_exceptions=True)
        behind = []
        for (_, passed), answer in zip(meeting.arrived.values(), received, strict=True):
            if isinstance(answer, BaseException):
                passed.set_exception(answer)
            elif answer:
                behind.append(passed)
            else:
                passed.set_result(True)
        problems = [str(answer) for answer in (sent, *received) if answer]
        if problems:
            self._members = []
            log.warning(
                "version %d goes to %d workers by the object store: %s", manifest.version, len(behind), problems
            )
        if isinstance(sent, BaseException):
            raise sent
        if behind:
            await self._store.store(learner)
        for passed in behind:
            passed.set_result(False)

    async def _group_members(self, learner: Any, workers: Sequence[Any]) -> list[GroupMember]:
        """The members' places in the line: the old ones if it holds and they are the same."""
        members = [learner, *workers]
        if len(members) != len(self._members) or not all(map(operator.is_, members, self._members)):
            self._address = await _within(learner.open_group.remote(), self._timeout_s, "the learner")
            self._members, self._number = members, self._number + 1
        count = len(members)
        return [
            GroupMember(self._number, self._address, rank, count, self._backend, self._timeout_s)
            for rank in range(count)
        ]


class _Meeting:
    """The workers of one `publish`: called, then here or lost."""

    def __init__(self, seats: Sequence[SupervisedActor]) -> None:
        self.missing = dict.fromkeys(seats)
        self.arrived: dict[SupervisedActor, tuple[Any, asyncio.Future[bool | None]]] = {}
        self.complete = asyncio.Event()
        self.came: dict[SupervisedActor, float] = {}
        self.began: float | None = None
        self._order = list(seats)
        self._look()

    async def arrive(self, seat: SupervisedActor, worker: Any) -> bool | None:
        """Wait for the others: True if the version came, False if the store has it, None if neither."""
        passed: asyncio.Future[bool | None] = asyncio.get_running_loop().create_future()
        self.arrived[seat], self.came[seat] = (worker, passed), time.perf_counter()
        self.leave(seat)
        return await passed

    def leave(self, seat: SupervisedActor) -> None:
        """Wait no more for a seat."""
        self.missing.pop(seat, None)
        self._look()

    def waited(self, seat: SupervisedActor) -> float:
        """Seconds that a seat's actor was kept from work by others."""
        assert self.began is not None, "nobody waits any more"
        return self.began - self.came[seat]

    def end(self) -> None:
        """Let everyone go who still waits: the learner was lost."""
        self.began = self.began or time.perf_counter()  # where nothing was sent it was all waiting
        for _, passed in self.arrived.values():
            if not passed.done():
                passed.set_result(None)

    def _look(self) -> None:
        if not self.missing and not self.complete.is_set():
            self.arrived = {seat: self.arrived[seat] for seat in self._order if seat in self.arrived}
            self.complete.set()


async def _within(answer: Awaitable[Result], seconds: float, who: str) -> Result:
    """An actor's answer.

    Raises:
        WorkerLost: it took too long.
    """

    try:
        return await in_time(answer, seconds)
    except TimeoutError:
        raise WorkerLost(f"{who} gave no answer within {seconds:g} s") from None
