"""Pools: the supervised actors of one role. A call goes to one that is ready; a lost one is refilled meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

from stage_ray.actors.client import ArgumentsLost, WorkerLost
from stage_ray.actors.supervised import ActorNotReady, Ask, C, SupervisedActor, Sync
from stage_ray.errors import ConfigError

log = logging.getLogger(__name__)
Result = TypeVar("Result")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Between starts of one actor that fail: each pause is twice the one before."""
LOST_PAUSE_S = 1.0
"""Between two looks whether there is something to sync with again."""


class NoWorkersLeft(WorkerLost):
    """A pool has no worker, and gets none."""


class Pool(Generic[C]):
    """Between ``least`` and ``most`` workers of one role, as the cluster has room for them.

    The first ``least`` must start with the run. The others, and the successors of lost ones, join whenever Ray finds
    room (an autoscaler sees them wait), and stay to the end. The run goes on while one worker is left, and waits
    ``start_timeout_s`` for the first to come back. A start that fails is tried again for ever.

    Example:
        pool = Pool("rollout", 2, 8, start, start_timeout_s=300, attempts=3)
        await pool.ready()
        groups = await pool.call(lambda worker: worker.generate(requests), timeout_s=600, attempts=3)
    """

    def __init__(
        self,
        role: str,
        least: int,
        most: int | None,
        start: Callable[[str], C],
        *,
        start_timeout_s: float,
        attempts: int,
        sync: Sync[C] | None = None,
    ) -> None:
        """Start every worker, without waiting for any.

        Args:
            role: for names: ``rollout-0`` and so on.
            least, most: workers that the run needs, and may have; None: no more than it needs.
            attempts: starts in a row that may fail in every actor before a run without any worker ends.
            start, start_timeout_s, sync: as `SupervisedActor`.
        """
        self.role = role
        self._least, self._attempts, self._start_timeout_s = least, attempts, start_timeout_s
        self._refills: dict[SupervisedActor[C], asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._failed_starts: Counter[SupervisedActor[C]] = Counter()  # in a row
        self._failure: WorkerLost | ConfigError | None = None  # of the last start
        self._fault: BaseException | None = None  # a bug in the refilling itself
        self._calls = 0
        self.actors = [
            SupervisedActor(f"{role}-{i}", start, start_timeout_s=start_timeout_s, sync=sync, on_loss=self.refill)
            for i in range(most or least)
        ]

    @property
    def open(self) -> list[SupervisedActor[C]]:
        """The actors that can be asked now."""
        return [actor for actor in self.actors if actor.is_ready]

    async def ready(self) -> None:
        """Wait until the workers that the run needs are warm.

        Raises:
            ConfigError, WorkerLost: one of them found the config wrong, or did not start.
        """
        for actor in self.actors[self._least :]:
            self.refill(actor)
        await asyncio.gather(*(actor.ready(self._start_timeout_s) for actor in self.actors[: self._least]))

    async def call(
        self,
        ask: Ask[C, Result],
        timeout_s: float | None,
        *,
        turn: int | None = None,
        attempts: int = 1,
        retry: type[WorkerLost] = WorkerLost,
        on_retry: Callable[[], None] = lambda: None,
    ) -> Result:
        """Ask one worker, and where it is lost another one, up to ``attempts`` times in all.

        Args:
            ask: from the worker's client to the answer to come.
            timeout_s: seconds the answer may take once it is this call's turn.
            turn: which of the open actors, modulo their number; None takes the one with the shortest queue.
            retry: which losses another attempt follows.
            on_retry: called before each further attempt.

        Raises:
            WorkerLost, WorkerFailed, WorkerDied: the last attempt failed too.
            NoWorkersLeft, ConfigError: as `wait_any`.
        """
        while True:
            await self.wait_any()
            actors = self.open
            if turn is None:
                self._calls += 1
                first = self._calls % len(actors)  # of equal queues the first in this order: they take turns
                actor = min(actors[first:] + actors[:first], key=lambda actor: actor.waiting)
            else:
                actor = actors[turn % len(actors)]
            try:
                return await actor.call(ask, timeout_s, if_ready=True)
            except ActorNotReady:
                continue
            except WorkerLost as lost:
                attempts -= 1
                if attempts <= 0 or not isinstance(lost, retry):
                    raise
                on_retry()

    async def wait_any(self) -> None:
        """Wait until one actor is open.

        Raises:
            NoWorkersLeft: none came in ``start_timeout_s``, or ``attempts`` starts in a row failed in every actor.
            ConfigError: what the worker that tried last found wrong with the config.
        """
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while self._fault is None and not self.open:
                    if min(self._failed_starts[actor] for actor in self.actors) >= self._attempts:
                        break
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            where = f"no {self.role} worker is left and none started within {self._start_timeout_s:g} s"
            why = f"the last one that tried: {self._failure}" if self._failure else "has the cluster room for one?"
            raise NoWorkersLeft(f"{where}: {why}") from self._failure
        if self._fault is not None:
            raise self._fault
        if not self.open:
            if isinstance(self._failure, ConfigError):
                raise self._failure
            raise NoWorkersLeft(f"no {self.role} worker is left and none starts: {self._failure}") from self._failure

    def refill(self, actor: SupervisedActor[C]) -> None:
        """Start an actor's worker as soon as there is room for it."""
        if actor not in self._refills or self._refills[actor].done():
            self._refills[actor] = asyncio.create_task(self._refill(actor))
            self._refills[actor].add_done_callback(self._refilled)

    async def close(self) -> None:
        """Refill no actor any more."""
        for task in self._refills.values():
            task.cancel()
        await asyncio.gather(*self._refills.values(), return_exceptions=True)

    async def _refill(self, actor: SupervisedActor[C]) -> None:
        """Try until a worker is ready: what keeps one from starting (memory that is not free yet, say) may pass."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                await actor.ready(None)
                self._failed_starts[actor] = 0
                return
            except ArgumentsLost:  # the version that was newest went down with a node: the next one is as good
                await asyncio.sleep(LOST_PAUSE_S)
                continue
            except ConfigError as error:  # a successor would read the same config
                log.error("%s: %s; its place stays empty", actor.name, error)
                self._failed(actor, error, self._attempts)
                return
            except WorkerLost as lost:
                log.warning("%s; another takes its place in %g s", lost, pause_s)
                self._failed(actor, lost, self._failed_starts[actor] + 1)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            actor.restart()

    def _failed(self, actor: SupervisedActor[C], failure: WorkerLost | ConfigError, starts: int) -> None:
        actor.stop()
        self._failure, self._failed_starts[actor] = failure, starts
        self._changed.set()

    def _refilled(self, task: asyncio.Task[None]) -> None:
        """A worker joined, or the refilling itself failed: then the next caller is told."""
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("the %s workers are not refilled any more", self.role, exc_info=fault)
            self._fault = fault
        self._changed.set()
