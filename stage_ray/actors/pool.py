"""Pools: the seats of one role. A call goes to a seat that is ready; a lost one is refilled behind the run's back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from stage_ray.actors.supervised import ActorNotReady, ArgumentsLost, SupervisedActor, WorkerLost
from stage_ray.errors import ConfigError

log = logging.getLogger(__name__)
Result = TypeVar("Result")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Between starts in one seat that fail: each pause is twice the one before."""
LOST_PAUSE_S = 1.0
"""Between two looks whether there is something to be prepared with again."""


class NoWorkersLeft(WorkerLost):
    """A pool has no actor, and gets none."""


class Pool:
    """Between ``least`` and ``most`` actors of one role, as the cluster has room for them.

    The first ``least`` must start with the run. The others, and the successors of lost ones, join whenever Ray finds
    room (an autoscaler sees them wait), and stay to the end: a run gives nobody back. It goes on while one actor is
    left, and waits ``start_timeout_s`` for the first to come back. A start that fails is tried again for ever.

    Example:
        pool = Pool("rollout", 2, 8, start, start_timeout_s=300, attempts=3)
        await pool.ready()
        answer = await pool.call(lambda worker: worker.generate.remote(request), timeout_s=600, attempts=3)
    """

    def __init__(
        self,
        role: str,
        least: int,
        most: int | None,
        start: Callable[[str], Any],
        *,
        start_timeout_s: float,
        attempts: int,
        **more: Any,
    ) -> None:
        """Start every actor, without waiting for any.

        Args:
            role: for names: ``rollout-0`` and so on.
            least, most: actors that the run needs, and may have; None: no more than it needs.
            attempts: starts in a row that may fail in every seat before a run without any actor ends.
            start, start_timeout_s, more: as `SupervisedActor`.
        """
        self.role = role
        self._least, self._attempts, self._start_timeout_s = least, attempts, start_timeout_s
        self._refills: dict[SupervisedActor, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._failed_starts: dict[SupervisedActor, int] = {}  # in a row
        self._failure: WorkerLost | ConfigError | None = None  # of the last start
        self._fault: BaseException | None = None  # our own, in the refilling
        self._turn = 0
        self.seats = [
            SupervisedActor(f"{role}-{i}", start, start_timeout_s=start_timeout_s, on_loss=self.refill, **more)
            for i in range(most or least)
        ]

    @property
    def open(self) -> list[SupervisedActor]:
        """The seats that can be asked now."""
        return [seat for seat in self.seats if seat.is_ready]

    async def ready(self) -> None:
        """Wait until the actors that the run needs are warm.

        Raises:
            ConfigError, WorkerLost: one of them found the config wrong, or did not start.
        """
        for seat in self.seats[self._least :]:
            self.refill(seat)
        await asyncio.gather(*(seat.start(self._start_timeout_s) for seat in self.seats[: self._least]))

    async def call(
        self,
        ask: Callable[[Any], Awaitable[Result]],
        timeout_s: float | None,
        *,
        turn: int | None = None,
        attempts: int = 1,
        retry: type[WorkerLost] = WorkerLost,
        on_retry: Callable[[], None] = lambda: None,
    ) -> Result:
        """Ask one actor, and where it is lost another one, up to ``attempts`` times in all.

        Args:
            ask: from the actor to the answer to come.
            timeout_s: seconds the answer may take once it is this call's turn.
            turn: which of the open seats, modulo their number; None takes the one with the shortest queue.
            retry: which losses another attempt follows.
            on_retry: called before each further attempt.

        Raises:
            WorkerLost, WorkerFailed, WorkerDied: the last attempt failed too.
            NoWorkersLeft, ConfigError: as `wait_any`.
        """
        while True:
            seat = await self._choose(turn)
            try:
                return await seat.call(ask, timeout_s, if_ready=True)
            except ActorNotReady:
                continue
            except WorkerLost as lost:
                attempts -= 1
                if attempts <= 0 or not isinstance(lost, retry):
                    raise
                on_retry()

    def refill(self, seat: SupervisedActor) -> None:
        """Let an actor take an empty seat as soon as there is room for it."""
        if seat not in self._refills or self._refills[seat].done():
            self._refills[seat] = asyncio.create_task(self._refill(seat))
            self._refills[seat].add_done_callback(self._refilled)

    async def close(self) -> None:
        """Wait for nobody any more."""
        for task in self._refills.values():
            task.cancel()
        await asyncio.gather(*self._refills.values(), return_exceptions=True)

    async def wait_any(self) -> None:
        """Wait until one seat is open.

        Raises:
            NoWorkersLeft: none came in ``start_timeout_s``, or ``attempts`` starts in a row failed in every seat.
            ConfigError: what the actor that tried last found wrong with the config.
        """
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while True:
                    if self._fault is not None:
                        raise self._fault
                    if self.open:
                        return
                    self._raise_if_hopeless()
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            where = f"no {self.role} worker is left and none started within {self._start_timeout_s:g} s"
            why = f"the last one that tried: {self._failure}" if self._failure else "has the cluster room for one?"
            raise NoWorkersLeft(f"{where}: {why}") from self._failure

    def _raise_if_hopeless(self) -> None:
        if min(self._failed_starts.get(seat, 0) for seat in self.seats) < self._attempts:
            return
        if isinstance(self._failure, ConfigError):
            raise self._failure
        raise NoWorkersLeft(f"no {self.role} worker is left and none starts: {self._failure}") from self._failure

    async def _choose(self, turn: int | None) -> SupervisedActor:
        """The open seat whose turn it is, or with the fewest calls; among equals they take turns."""
        await self.wait_any()
        seats = self.open
        if turn is not None:
            return seats[turn % len(seats)]
        self._turn += 1
        order = [seats[(self._turn + i) % len(seats)] for i in range(len(seats))]
        return min(order, key=lambda seat: seat.waiting)

    async def _refill(self, seat: SupervisedActor) -> None:
        """Until an actor sits there: what keeps one from starting (memory that is not free yet, say) may pass."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                await seat.start(None)
                self._failed_starts.pop(seat, None)
                return
            except ArgumentsLost:  # the version that was newest went down with a node: the next one is as good
                await asyncio.sleep(LOST_PAUSE_S)
                continue
            except ConfigError as error:  # a successor would read the same config
                log.error("%s: %s; its seat stays empty", seat.name, error)
                self._failed(seat, error, self._attempts)
                return
            except WorkerLost as lost:
                log.warning("%s; another takes its seat in %g s", lost, pause_s)
                self._failed(seat, lost, self._failed_starts.get(seat, 0) + 1)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            seat.restart()

    def _failed(self, seat: SupervisedActor, failure: WorkerLost | ConfigError, starts: int) -> None:
        seat.stop()
        self._failure, self._failed_starts[seat] = failure, starts
        self._changed.set()

    def _refilled(self, task: asyncio.Task[None]) -> None:
        """Somebody joined, or the refilling itself failed: whoever asks next is told."""
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("a seat of the %s workers is not refilled any more", self.role, exc_info=fault)
            self._fault = fault
        self._changed.set()
