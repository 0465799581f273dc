"""How a policy version gets from the learner to the rollout workers: one interface, and the way any machine has.

A worker gets the newest version before its first request, and a version whole or not at all (promise 6).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import ray

from stage_ray.actors.client import ArgumentsLost, WorkerLost, in_time
from stage_ray.actors.supervised import Ask, SupervisedActor

if TYPE_CHECKING:
    from stage_ray.workers.learner import LearnerClient
    from stage_ray.workers.rollout import RolloutClient

Result = TypeVar("Result")


class CallLearner(Protocol):
    """`stage_ray.cluster.learner.ClusterLearner.call`."""

    def __call__(self, ask: Ask[LearnerClient, Result], *, patient: bool = False) -> Awaitable[Result]:
        """See there."""
        ...


class Transport(Protocol):
    """`ObjectStore`, or `stage_ray.weights.broadcast.Broadcast`."""

    @property
    def version(self) -> int | None:
        """The newest version, None before the first `publish`."""
        ...

    async def publish(self, actors: Sequence[SupervisedActor[RolloutClient]]) -> None:
        """Make the learner's version the newest; every started worker takes it after the calls that it has now."""
        ...

    def newest(self, name: str, worker: RolloutClient) -> Awaitable[int] | None:
        """Bring it to a worker that just started, under that name; None where there is nothing to bring.

        Raises:
            WorkerLost: when awaited, as `taken`.
        """
        ...

    async def settled(self) -> bool:
        """Wait until every worker has taken what was published last, or is lost; whether there was anything to do."""
        ...


@dataclass(frozen=True, slots=True)
class Publication:
    """One policy version in the object store."""

    version: int
    manifest: Any
    chunks: tuple[Any, ...]


class ObjectStore:
    """The learner puts a version into Ray's object store; each worker takes it from there in its own time."""

    def __init__(self, call_learner: CallLearner, timeout_s: float) -> None:
        self._call_learner, self._timeout_s = call_learner, timeout_s
        self._loading: list[asyncio.Task[None]] = []
        self.published: Publication | None = None

    @property
    def version(self) -> int | None:
        """The newest version, None before the first `publish`."""
        return self.published.version if self.published else None

    async def publish(self, actors: Sequence[SupervisedActor[RolloutClient]]) -> None:
        """Store the learner's version, and let every started worker load it."""
        await self._call_learner(self.store)
        self._loading = [asyncio.create_task(unless_lost(self.load(actor))) for actor in actors if actor.started]

    async def store(self, learner: LearnerClient) -> None:
        """Store the learner's version, where it is the caller's turn at the learner already."""
        manifest = await learner.pack()
        version, chunks = learner.chunks(manifest.chunks)
        await version  # a learner that dies before all are stored is lost here, not in every worker that loads them
        self.published = Publication(manifest.version, ray.put(manifest), tuple(chunks))

    async def load(self, actor: SupervisedActor[RolloutClient]) -> int:
        """Let a worker load what is newest when it is its turn; the version that it then serves."""

        async def load(worker: RolloutClient) -> int:
            newest = self.newest(actor.name, worker)
            assert newest is not None, "nothing was published"
            return await newest

        return await actor.call(load, None, if_ready=True)

    def newest(self, name: str, worker: RolloutClient) -> Awaitable[int] | None:
        """Let a worker load it; None where nothing was published."""
        if self.published is None:
            return None
        loading = worker.load_weights(self.published.manifest, self.published.chunks)
        return taken(loading, name, self.published.version, self._timeout_s)

    async def settled(self) -> bool:
        """Wait until every worker has loaded it, or is lost."""
        loading, self._loading = self._loading, []
        await asyncio.gather(*loading)
        return bool(loading)


async def unless_lost(loading: Awaitable[object]) -> None:
    """Wait for a worker to load; one that is lost gives its successor the version, and a version that went down with
    the learner's node is followed by that of the next learner.
    """
    with contextlib.suppress(WorkerLost, ArgumentsLost):
        await loading


async def taken(
    loading: Awaitable[Result], name: str, version: int, timeout_s: float, patience_s: float | None = None
) -> Result:
    """What the worker ``name`` answers when it has a version.

    Raises:
        WorkerLost: it is late: it took longer than ``patience_s``, or else ``timeout_s`` (`cluster.sync_timeout_s`).
    """
    try:
        return await in_time(loading, timeout_s if patience_s is None else patience_s)
    except TimeoutError:
        late = f"{name} did not take version {version} within cluster.sync_timeout_s = {timeout_s:g} s"
        raise WorkerLost(late) from None
