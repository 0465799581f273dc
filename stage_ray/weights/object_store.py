"""How a policy version gets from the learner to the rollout workers: one interface, and the way any machine has.

A worker gets the newest version before its first request, and a version whole or not at all (promise 6).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import ray

from stage_ray.actors.supervised import SupervisedActor, WorkerLost, in_time

Result = TypeVar("Result")


class CallLearner(Protocol):
    """`Cluster.call_learner`."""

    def __call__(self, ask: Callable[[Any], Any], *, patient: bool = False) -> Awaitable[Any]:
        """See there."""
        ...


class Transport(Protocol):
    """`ObjectStore`, or `stage_ray.weights.broadcast.Broadcast`."""

    @property
    def version(self) -> int | None:
        """The newest version, None before the first `publish`."""
        ...

    async def publish(self, seats: Sequence[SupervisedActor]) -> None:
        """Make the learner's version the newest; then, at once, `load` is called for every seat that has started."""
        ...

    async def load(self, seat: SupervisedActor) -> int | None:
        """Bring it to a seat's actor when it is its turn; the version served, None if that is still the one before.

        Raises:
            WorkerLost: as `SupervisedActor.call`.
        """
        ...

    def newest(self, name: str, worker: Any) -> Awaitable[int] | None:
        """Bring it to an actor that just started, in the seat of that name; None where there is nothing to bring.

        Raises:
            WorkerLost: when awaited, as `taken`.
        """
        ...

    async def settled(self) -> None:
        """Wait until the learner has nothing to do with the last `publish` any more."""
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
        self._ask_learner, self._timeout_s = call_learner, timeout_s
        self.published: Publication | None = None

    @property
    def version(self) -> int | None:
        """The newest version, None before the first `publish`."""
        return self.published.version if self.published else None

    async def publish(self, seats: Sequence[SupervisedActor]) -> None:
        """Store the learner's version."""
        await self._ask_learner(self.store)

    async def store(self, learner: Any) -> None:
        """The same, where it is the caller's turn at the learner already."""
        manifest = await learner.pack.remote()
        version, *chunks = learner.chunks.options(num_returns=1 + manifest.chunks).remote()
        await version  # a learner that dies before all are stored is lost here, not in every worker that loads them
        self.published = Publication(manifest.version, ray.put(manifest), tuple(chunks))

    async def load(self, seat: SupervisedActor) -> int | None:
        """Let a seat's actor load what is newest when it is its turn."""

        def load(worker: Any) -> Any:
            newest = self.newest(seat.name, worker)
            assert newest is not None, "nothing was published"
            return newest

        return await seat.call(load, None, if_ready=True)

    def newest(self, name: str, worker: Any) -> Awaitable[int] | None:
        """Let an actor load it; None where nothing was published."""
        if self.published is None:
            return None
        loading = worker.load_weights.remote(self.published.manifest, *self.published.chunks)
        return taken(loading, name, self.published.version, self._timeout_s)

    async def settled(self) -> None:
        """Nothing to wait for: `publish` returns when all is stored."""


async def taken(
    loading: Awaitable[Result], name: str, version: int, timeout_s: float, patience_s: float | None = None
) -> Result:
    """What the worker in the seat ``name`` answers when it has a version.

    Raises:
        WorkerLost: it is late: it took longer than ``patience_s``, or else ``timeout_s`` (`cluster.sync_timeout_s`).
    """
    try:
        return await in_time(loading, timeout_s if patience_s is None else patience_s)
    except TimeoutError:
        late = f"{name} did not take version {version} within cluster.sync_timeout_s = {timeout_s:g} s"
        raise WorkerLost(late) from None
