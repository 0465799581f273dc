"""How a policy version gets from the learner to the rollout workers: through Ray's object store, or by a broadcast."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from stage_ray.actors.client import ArgumentsLost, Client, WorkerLost, in_time
from stage_ray.actors.supervised import SupervisedActor
from stage_ray.cluster.learner import ClusterLearner
from stage_ray.errors import LearnerLostError
from stage_ray.records import WeightManifest
from stage_ray.weights.process_groups import Backend, GroupMember
from stage_ray.workers.learner import LearnerWorker
from stage_ray.workers.rollout import RolloutClient, RolloutWorker

log = logging.getLogger(__name__)
RolloutActor = SupervisedActor[RolloutClient]
GRACE_S = 15.0  # for members to give up by themselves, after `GroupMember.timeout_s`, twice if they have to connect


@dataclass(frozen=True, slots=True)
class Publication:
    """One policy version in the object store."""

    version: int
    manifest: Any  # a reference, as each of the chunks
    chunks: tuple[Any, ...]


class ObjectStore:
    """The learner puts a version into Ray's object store; each worker takes it from there in its own time."""

    def __init__(self, learner: ClusterLearner, timeout_s: float) -> None:
        """``timeout_s``: seconds in which a worker must connect, and take a version (`cluster.sync_timeout_s`)."""
        self.version: int | None = None  # the newest one; None before the first `publish`
        self.published: Publication | None = None  # the one that is stored
        self._learner, self._timeout_s = learner, timeout_s
        self._dtypes: dict[str, str] = {}  # of the engine that each actor started last
        self._loading: list[asyncio.Task[None]] = []

    async def publish(self, actors: Sequence[RolloutActor]) -> None:
        """Make the learner's version the newest; every started worker takes it after the calls that it has now."""
        self.version = await self._learner.call(self._store)
        self._loading = [asyncio.create_task(self.load(actor)) for actor in actors if actor.started]

    async def settled(self) -> bool:
        """Wait until every worker has taken what was published last, or is lost; whether there was anything to do."""
        loading, self._loading = self._loading, []
        await asyncio.gather(*loading)
        return bool(loading)

    async def join(self, name: str, worker: Client) -> None:
        """Ask a worker that has started which dtype its engine holds, then bring it the newest version."""
        asking = worker.ask(RolloutWorker.weight_dtype)
        late = f"{name} did not name its dtype within cluster.sync_timeout_s = {self._timeout_s:g} s"
        self._dtypes[name] = await in_time(asking, self._timeout_s, late)
        await self.newest(name, worker)

    async def newest(self, name: str, worker: Client) -> None:
        """Bring the newest version, if there is one, to a worker whose turn it is; WorkerLate if it takes too long."""
        if (stored := self.published) is not None:
            loading = worker.ask(RolloutWorker.load_weights, stored.manifest, *stored.chunks)
            await in_time(loading, self._timeout_s, self._late(name, stored.version))

    async def load(self, actor: RolloutActor, *, held: bool = False) -> None:
        """Let a worker take what is newest, in its turn unless it is ``held``; of a lost one the successor takes it."""
        # Arguments are lost where a version went down with the learner's node: the next version follows it.
        with contextlib.suppress(WorkerLost, ArgumentsLost):
            ask = partial(self.newest, actor.name)
            await (actor.ask(ask, None) if held else actor.call(ask, None, if_ready=True))

    @property
    def _dtype(self) -> str:
        """What a version travels in: the dtype of all engines, so that no byte is sent in vain; float32 if they differ.

        An engine rounds what it is given as the learner would, to the same bits. One of another dtype than all before
        it takes what is stored when it joins; from the next version on all get float32.
        """
        dtypes = set(self._dtypes.values())
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    async def _store(self, learner: Client) -> int:
        """Store the version of a learner whose turn it is."""
        count = await learner.ask(LearnerWorker.pack, self._dtype)
        answer, (*chunks, manifest) = learner.first.ask_objects(LearnerWorker.chunks, count + 1)
        version = await answer
        # A learner that dies before all are stored, or finds a version unsound, says so here, not in every worker.
        await manifest
        self.published = Publication(version, manifest, tuple(chunks))
        return int(version)

    def _late(self, name: str, version: int) -> str:
        return f"{name} did not take version {version} within cluster.sync_timeout_s = {self._timeout_s:g} s"


class Broadcast(ObjectStore):
    """The learner and all workers that can be asked are held, each from its turn on, and only then is a version sent.

    So no member waits in a transfer for one that still draws or has died, and who takes part is known: the group is
    built again whenever that changes. One that breaks costs no worker the old version; those that did not get the new
    one take it from the object store, as does a worker that starts between two versions. The learner fills the store
    when that is needed, and only until its next update: after that a newcomer waits for the version which that makes.
    """

    def __init__(self, learner: ClusterLearner, timeout_s: float, backend: Backend) -> None:
        super().__init__(learner, timeout_s)
        self._backend = backend
        self._superseded = asyncio.Event()
        self._members: list[Client] = []
        self._address, self._number = "", 0

    async def publish(self, actors: Sequence[RolloutActor]) -> None:
        manifest = await self._learner.call(lambda learner: learner.ask(LearnerWorker.offer, self._dtype))
        self.published = None
        if any(actor.started and not actor.is_ready for actor in actors):
            await self._learner.call(self._store)
        self.version = manifest.version
        held = AsyncExitStack()
        # They queue now, not when it is the learner's turn: what is asked for later is drawn with this version.
        turns = asyncio.gather(*(self._hold(actor, held) for actor in actors if actor.is_ready))
        behind = [self.load(actor) for actor in actors if actor.started and not actor.is_ready]
        self._loading = [asyncio.create_task(work) for work in (self._pass(held, turns, manifest), *behind)]
        self._superseded.set()
        self._superseded = asyncio.Event()

    async def newest(self, name: str, worker: Client) -> None:
        """As the store's; a version that was not stored before the learner moved on is followed by the next one."""

        async def store(learner: Client) -> None:
            if not self._stored and await learner.first.ask(LearnerWorker.version) == self.version:
                await self._store(learner)

        while not self._stored:
            superseded = self._superseded
            with contextlib.suppress(LearnerLostError):
                await self._learner.call(store)
            if not self._stored:
                await superseded.wait()
        await super().newest(name, worker)

    @property
    def _stored(self) -> bool:
        return self.version == (self.published and self.published.version)

    async def _hold(self, actor: RolloutActor, held: AsyncExitStack) -> RolloutActor | None:
        """Wait for an actor's turn and keep it until ``held`` is closed; None where the worker was lost before."""
        await actor.lock.acquire()
        if not actor.is_ready:
            actor.lock.release()  # its successor is set up meanwhile
            return None
        held.callback(actor.lock.release)
        return actor

    async def _pass(
        self, held: AsyncExitStack, turns: asyncio.Future[list[RolloutActor | None]], manifest: WeightManifest
    ) -> None:
        """Hold the learner until every worker is held or lost, then let the version go from one to the others."""

        async def send(learner: Client) -> tuple[list[RolloutActor], float]:
            came = time.perf_counter()
            actors = [actor for actor in await turns if actor is not None]
            waited_s = time.perf_counter() - came
            return await self._send(learner, actors, manifest) if actors else [], waited_s

        async with held:
            held.callback(turns.cancel)  # of a learner that was lost before its turn
            with contextlib.suppress(LearnerLostError):  # the next call of the learner says so
                behind, waited_s = await self._learner.call(send, patient=True)
                self._learner.actor.busy_s -= waited_s
                await asyncio.gather(*(self.load(actor, held=True) for actor in behind))

    async def _send(
        self, learner: Client, actors: Sequence[RolloutActor], manifest: WeightManifest
    ) -> list[RolloutActor]:
        """Send a version to workers that are held; those that live and did not get it, for whom it is stored."""
        late, limit_s = "the learner gave no answer within {:g} s".format, 2 * self._timeout_s + GRACE_S
        members = [learner, *(actor.client for actor in actors)]
        if members != self._members:  # clients are equal where they are the same object
            opening = learner.first.ask(LearnerWorker.open_group)
            self._address = await in_time(opening, self._timeout_s, late(self._timeout_s))
            self._members, self._number = members, self._number + 1
        first, *others = (
            GroupMember(self._number, self._address, rank, len(members), self._backend, self._timeout_s)
            for rank in range(len(members))
        )

        def receive(actor: RolloutActor, member: GroupMember) -> Awaitable[str]:
            def ask(worker: Client) -> Awaitable[str]:
                receiving = worker.ask(RolloutWorker.receive, manifest, member)
                return in_time(receiving, limit_s, self._late(actor.name, manifest.version))

            return actor.ask(ask, None)

        sending = in_time(learner.first.ask(LearnerWorker.send, first), limit_s, late(limit_s))
        # Why a member may not have the version, "" where it has; or how it was lost.
        sent, *received = await asyncio.gather(sending, *map(receive, actors, others), return_exceptions=True)
        behind = [actor for actor, why in zip(actors, received, strict=True) if why and isinstance(why, str)]
        if problems := [str(why) for why in (sent, *received) if why]:
            self._members = []
            log.warning("version %d goes to %d workers by the object store: %s", self.version, len(behind), problems)
        if isinstance(sent, BaseException):
            raise sent
        if behind:
            await self._store(learner)
        return behind
