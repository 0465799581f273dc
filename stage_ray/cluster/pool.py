"""Pools: the seats of one role. A call goes to a seat that is ready; a lost one is refilled behind the run's back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from stage_ray.cluster.seats import Seat, SeatEmpty, WorkerLost

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Pool:
    """Between ``least`` and ``most`` actors of one role, as the cluster has room for them.

    The first ``least`` must start with the run. The others, and the successors of lost ones, join whenever Ray finds
    room (an autoscaler sees them wait); the run goes on while one actor is left, and waits ``start_timeout_s`` for the
    first to come back.

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
            attempts: starts in a row that may fail before a seat is given up.
            start, start_timeout_s, more: as `Seat`.
        """
        self.role = role
        self._least, self._attempts, self._start_timeout_s = least, attempts, start_timeout_s
        self.seats = [Seat(f"{role}-{i}", start, start_timeout_s=start_timeout_s, **more) for i in range(most or least)]
        self._refills: dict[Seat, asyncio.Task[None]] = {}
        self._joined = asyncio.Event()
        self._failure: BaseException | None = None
        self._turn = 0

    @property
    def open(self) -> list[Seat]:
        """The seats that can be asked now."""
        return [seat for seat in self.seats if seat.is_ready]

    async def ready(self) -> None:
        """Wait until the actors that the run needs are warm.

        Raises:
            ConfigError, WorkerLost: one of them found the config wrong, or did not start.
        """
        for seat in self.seats[self._least :]:
            self.refill(seat)
        await asyncio.gather(*(seat.fill(self._start_timeout_s) for seat in self.seats[: self._least]))

    async def call(
        self,
        ask: Callable[[Any], Awaitable[Result]],
        timeout_s: float | None,
        *,
        turn: int | None = None,
        attempts: int = 1,
        on_retry: Callable[[], None] = lambda: None,
    ) -> Result:
        """Ask one actor, and where it is lost another one, up to ``attempts`` times in all.

        Args:
            ask: from the actor to the answer to come.
            timeout_s: seconds the answer may take once it is this call's turn.
            turn: which of the open seats, modulo their number; None takes the one with the shortest queue.
            on_retry: called before each further attempt.

        Raises:
            WorkerLost, WorkerFailed: the last attempt failed too, or no actor is left and none came in time.
            ConfigError: an actor found the config wrong.
        """
        while True:
            seat = await self._choose(turn)
            try:
                return await seat.call(ask, timeout_s, if_ready=True)
            except SeatEmpty:
                continue
            except WorkerLost:
                self.refill(seat)
                attempts -= 1
                if attempts <= 0:
                    raise
                on_retry()

    def refill(self, seat: Seat) -> None:
        """Let an actor take an empty seat as soon as there is room for it."""
        if seat not in self._refills or self._refills[seat].done():
            self._refills[seat] = asyncio.create_task(self._refill(seat))

    async def close(self) -> None:
        """Wait for nobody any more."""
        for task in self._refills.values():
            task.cancel()
        await asyncio.gather(*self._refills.values(), return_exceptions=True)

    async def anyone(self) -> None:
        """Wait until one seat is open.

        Raises:
            WorkerLost, ConfigError: every seat was given up, or none came in ``start_timeout_s``.
        """
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while not self.open:
                    if self._failure is not None and all(task.done() for task in self._refills.values()):
                        raise self._failure
                    self._joined.clear()
                    await self._joined.wait()
        except TimeoutError:
            where = f"no {self.role} worker is left and none started within {self._start_timeout_s:g} s"
            raise WorkerLost(f"{where}: has the cluster room for one?") from None

    async def _choose(self, turn: int | None) -> Seat:
        """The open seat whose turn it is, or with the fewest calls; among equals they take turns."""
        await self.anyone()
        seats = self.open
        if turn is not None:
            return seats[turn % len(seats)]
        self._turn += 1
        order = [seats[(self._turn + i) % len(seats)] for i in range(len(seats))]
        return min(order, key=lambda seat: seat.waiting)

    async def _refill(self, seat: Seat) -> None:
        for left in reversed(range(self._attempts)):
            try:
                await seat.fill(None)
                self._failure = None
                break
            except WorkerLost as lost:
                self._failure = lost
                log.warning("%s; %s", lost, "another takes its seat" if left else "its seat stays empty")
                if left:
                    seat.restart()
                else:
                    seat.kill()
            except Exception as error:  # a config that is wrong: whoever asks next is told
                self._failure = error
                break
        self._joined.set()
