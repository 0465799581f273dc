"""Every rollout worker gets a version at once, over a broadcast group of processes: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import operator
import time
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from stage_ray.actors.client import WorkerLost, in_time
from stage_ray.actors.supervised import SupervisedActor
from stage_ray.errors import LearnerLostError
from stage_ray.records import WeightManifest
from stage_ray.weights.broadcast_group import Backend, GroupMember
from stage_ray.weights.object_store import CallLearner, ObjectStore, taken, unless_lost

if TYPE_CHECKING:
    from stage_ray.workers.learner import LearnerClient
    from stage_ray.workers.rollout import RolloutClient

    RolloutActor = SupervisedActor[RolloutClient]

log = logging.getLogger(__name__)
Result = TypeVar("Result")
GRACE_S = 15.0
"""Members give up by themselves after `GroupMember.timeout_s`, twice if they have to connect; then after so long."""


class Broadcast:
    """The learner and all workers that can be asked are held, each from its turn on, and only then is a version sent.

    So no member waits in a transfer for one that still draws or has died, and who takes part is known: the group is
    built again whenever that changes. One that breaks costs no worker the old version; those that did not get the new
    one take it from the object store, as does a worker that starts between two versions. The learner fills the store
    when that is needed, and only until its next update: after that a newcomer waits for the version which that makes.
    """

    def __init__(
        self, backend: Backend, timeout_s: float, learner: SupervisedActor[LearnerClient], call_learner: CallLearner
    ) -> None:
        self._backend, self._timeout_s = backend, timeout_s
        self._learner, self._call_learner = learner, call_learner
        self._store = ObjectStore(call_learner, timeout_s)
        self._version: int | None = None
        self._loading: list[asyncio.Task[None]] = []
        self._superseded = asyncio.Event()
        self._members: list[Any] = []
        self._address, self._number = "", 0

    @property
    def version(self) -> int | None:
        """The newest version, None before the first `publish`."""
        return self._version

    async def publish(self, actors: Sequence[RolloutActor]) -> None:
        """Let the learner and the workers wait for each other, then send; workers that start now use the store."""
        manifest = await self._call_learner(lambda learner: learner.offer())
        self._store.published = None
        if any(actor.started and not actor.is_ready for actor in actors):
            await self._call_learner(self._store.store)
        self._version = manifest.version
        held = AsyncExitStack()
        # They queue now, not when it is the learner's turn: what is asked for later is drawn with this version.
        turns = asyncio.gather(*(self._hold(actor, held) for actor in actors if actor.is_ready))
        behind = [unless_lost(self._load(actor)) for actor in actors if actor.started and not actor.is_ready]
        self._loading = [asyncio.create_task(work) for work in (self._pass(held, turns, manifest), *behind)]
        self._superseded.set()
        self._superseded = asyncio.Event()

    def newest(self, name: str, worker: RolloutClient) -> Awaitable[int] | None:
        """Bring the newest version to a worker that just started, if there is one."""
        return None if self._version is None else self._newest(name, worker)

    async def settled(self) -> bool:
        """Wait until the learner has sent and every worker has taken it, or is lost."""
        loading, self._loading = self._loading, []
        await asyncio.gather(*loading)
        return bool(loading)

    async def _load(self, actor: RolloutActor) -> None:
        await actor.call(functools.partial(self._newest, actor.name), None, if_ready=True)

    async def _newest(self, name: str, worker: RolloutClient) -> int:
        while self._store.version != self._version:
            superseded = self._superseded
            if not await self._store_in_time():
                await superseded.wait()
        return await self._from_store(name, worker)

    async def _store_in_time(self) -> bool:
        """Whether the learner still had the newest version when it was asked to store it."""

        async def store(learner: LearnerClient) -> bool:
            if self._store.version != self._version and await learner.version() == self._version:
                await self._store.store(learner)
            return self._store.version == self._version

        try:
            return await self._call_learner(store)
        except LearnerLostError:
            return False

    async def _from_store(self, name: str, worker: RolloutClient) -> int:
        loading = self._store.newest(name, worker)
        assert loading is not None, "nothing was stored"
        return await loading

    async def _hold(self, actor: RolloutActor, held: AsyncExitStack) -> RolloutActor | None:
        """Wait for an actor's turn and keep it until ``held`` is closed; None where the worker was lost before."""
        async with AsyncExitStack() as turn:
            await turn.enter_async_context(actor.exclusive())
            if not actor.is_ready:  # its successor is set up meanwhile
                return None
            held.push_async_exit(turn.pop_all())
            return actor

    async def _pass(
        self, held: AsyncExitStack, turns: asyncio.Future[list[RolloutActor | None]], manifest: WeightManifest
    ) -> None:
        """Hold the learner until every worker is held or lost, then let the version go from one to the others."""
        behind: list[RolloutActor] = []
        waited_s = 0.0

        async def send(learner: LearnerClient) -> None:
            nonlocal behind, waited_s
            came = time.perf_counter()
            members = [actor for actor in await turns if actor is not None]
            waited_s = time.perf_counter() - came
            behind = await self._send(learner, members, manifest) if members else []

        async with held:
            held.callback(turns.cancel)  # of a learner that was lost before its turn
            with contextlib.suppress(LearnerLostError):  # the next call of the learner says so
                await self._call_learner(send, patient=True)
                self._learner.busy_s -= waited_s
            loads = (actor.ask(functools.partial(self._from_store, actor.name), None) for actor in behind)
            await asyncio.gather(*map(unless_lost, loads))

    async def _send(
        self, learner: LearnerClient, actors: Sequence[RolloutActor], manifest: WeightManifest
    ) -> list[RolloutActor]:
        """Send a version to workers that are held; those that live and did not get it, for whom it is stored."""
        first, *others = await self._group_members(learner, [actor.client for actor in actors])
        limit = 2 * self._timeout_s + GRACE_S

        async def receive(actor: RolloutActor, member: GroupMember) -> str:
            def ask(worker: RolloutClient) -> Awaitable[str]:
                return taken(worker.receive(manifest, member), actor.name, manifest.version, self._timeout_s, limit)

            return await actor.ask(ask, None)

        receiving = [receive(actor, member) for actor, member in zip(actors, others, strict=True)]
        answers = await asyncio.gather(_within(learner.send(first), limit), *receiving, return_exceptions=True)
        behind = [
            actor for actor, answer in zip(actors, answers[1:], strict=True) if answer and isinstance(answer, str)
        ]
        if problems := [str(answer) for answer in answers if answer]:
            self._members = []
            log.warning(
                "version %d goes to %d workers by the object store: %s", manifest.version, len(behind), problems
            )
        if isinstance(answers[0], BaseException):
            raise answers[0]
        if behind:
            await self._store.store(learner)
        return behind

    async def _group_members(self, learner: LearnerClient, workers: Sequence[RolloutClient]) -> list[GroupMember]:
        """The members' ranks in the group: the old group's if it holds and they are the same."""
        members = [learner, *workers]
        if len(members) != len(self._members) or not all(map(operator.is_, members, self._members)):
            self._address = await _within(learner.open_group(), self._timeout_s)
            self._members, self._number = members, self._number + 1
        return [
            GroupMember(self._number, self._address, rank, len(members), self._backend, self._timeout_s)
            for rank in range(len(members))
        ]


async def _within(answer: Awaitable[Result], seconds: float) -> Result:
    """The learner's answer.

    Raises:
        WorkerLost: it took too long.
    """
    try:
        return await in_time(answer, seconds)
    except TimeoutError:
        raise WorkerLost(f"the learner gave no answer within {seconds:g} s") from None
