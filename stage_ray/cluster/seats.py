"""Seats: the places of a run's actors. An actor dies, hangs or fails and is replaced; its seat stays."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from stage_ray.errors import ConfigError

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class WorkerLost(Exception):
    """An actor that cannot be used any more: it died, hung or was too slow. One sentence."""


class WorkerFailed(WorkerLost):
    """An actor that lives but raised, or answered what cannot be used."""


class SeatEmpty(WorkerLost):
    """The seat's actor was lost before this call's turn came; its successor is not ready yet."""


class ArgumentsLost(Exception):
    """What a call was about went down with a node; the actor is as good as before."""


class Seat:
    """One actor after another; one call at a time, in the order in which the calls came.

    Invariant: calls reach the actor in the order of `call`, across replacements too, because they queue at a fair lock.
    So a wave that was asked for before a weight update is drawn before it, and which version draws which group is
    settled when it is asked for.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[str], Any],
        *,
        start_timeout_s: float,
        prepare: Callable[[Any], Awaitable[Any] | None] = lambda actor: None,
        keep_failed: bool = False,
        kill: Callable[[Any], None] = ray.kill,
        patient: bool = False,
    ) -> None:
        """Start the first actor, without waiting for it.

        Args:
            name: for logs and messages; later actors get a number after it.
            start: makes an actor, given its name.
            start_timeout_s: seconds an actor may take until it answers.
            prepare: what an actor must do before its first call (load the newest weights); None where nothing.
            keep_failed: an actor that raised is kept: its state is worth more than a fresh start.
            kill: ends an actor.
            patient: ``prepare`` sets limits of its own.
        """
        self.name = name
        self.restarts = 0
        self.busy_s = 0.0
        self.waiting = 0
        self._start, self._start_timeout_s = start, start_timeout_s
        self._prepare, self._keep_failed, self._kill = prepare, keep_failed, kill
        self._prepare_timeout_s = None if patient else start_timeout_s
        self._lock = asyncio.Lock()
        self._pid: int | None = None
        self.is_ready = False
        self.started = False  # it answers, and takes the newest of what `prepare` gives it
        self._actor = start(name)

    async def fill(self, timeout_s: float | None) -> None:
        """`ready`, before any call that comes from now on; ``timeout_s`` None: whenever the cluster has room for it."""
        async with self._lock:
            await self.ready(timeout_s)

    async def ready(self, timeout_s: float | None) -> None:
        """Wait until the actor has started and is prepared.

        Raises:
            ConfigError: what it found wrong with the config.
            WorkerLost: it died, or needs too long.
        """
        if self.is_ready:
            return
        pid, node = await self._answer(self._actor.ping.remote(), timeout_s)
        self.started = True
        self._pid = pid if node == ray.get_runtime_context().get_node_id() else None
        preparation = self._prepare(self._actor)
        if preparation is not None:
            await self._answer(preparation, self._prepare_timeout_s)
        self.is_ready = True

    async def call(
        self, ask: Callable[[Any], Awaitable[Result]], timeout_s: float | None, *, if_ready: bool = False
    ) -> Result:
        """Ask the actor. When it is lost another one takes its seat, and is not asked.

        Args:
            ask: from the actor to the answer to come.
            timeout_s: seconds the answer may take once it is this call's turn; None waits for ever.
            if_ready: do not wait for an actor that is not ready when it is this call's turn.

        Raises:
            WorkerLost, WorkerFailed: another actor is starting in the seat.
            SeatEmpty: it was lost before, and ``if_ready``.
            ArgumentsLost: an object of the call is gone; nothing was asked.
            ConfigError: an actor found the config wrong.
        """
        self.waiting += 1
        try:
            async with self._lock:
                if if_ready and not self.is_ready:
                    raise SeatEmpty(f"{self.name} was lost before its turn came")
                try:
                    await self.ready(self._start_timeout_s)
                    began = time.perf_counter()
                    answer = await self._answer(ask(self._actor), timeout_s)
                    self.busy_s += time.perf_counter() - began
                    return answer
                except WorkerLost as lost:
                    if not (self._keep_failed and isinstance(lost, WorkerFailed)):
                        log.warning("%s; another takes its seat", lost)
                        self.restart()
                    raise
        finally:
            self.waiting -= 1

    def restart(self) -> None:
        """Kill the actor and start another."""
        self.kill()
        self.restarts += 1
        self.is_ready = self.started = False
        self._actor = self._start(f"{self.name}-restart-{self.restarts}")

    def kill(self) -> None:
        """End the actor's process, even one that is stopped."""
        self._kill(self._actor)
        if self._pid is not None:  # Ray asks the process itself, and a stopped one does not listen
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._pid, signal.SIGKILL)
        self._pid = None

    async def check(self, deadline_s: float) -> None:
        """Kill an actor that does not answer a ping in time; the call that waits for it then fails and replaces it."""
        if not self.is_ready:
            return
        actor = self._actor
        try:
            await asyncio.wait_for(_value(actor.ping.remote()), deadline_s)
        except TimeoutError:
            if actor is self._actor and self.is_ready:
                log.warning("%s: no heartbeat for %g s, so it is killed", self.name, deadline_s)
                self.kill()
        except RayError:
            return  # it is dead: whoever calls it finds out

    async def _answer(self, answer: Awaitable[Result], timeout_s: float | None) -> Result:
        try:
            return await asyncio.wait_for(_value(answer), timeout_s)
        except TimeoutError:
            raise WorkerLost(f"{self.name} gave no answer within {timeout_s:g} s") from None
        except (ObjectLostError, RayTaskError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if are_arguments_lost(error):
                raise ArgumentsLost(f"{self.name}: {first_line(cause)}") from error
            if isinstance(cause, ConfigError):
                raise ConfigError(str(cause)) from error
            raise WorkerFailed(f"{self.name} failed: {type(cause).__name__}: {first_line(cause)}") from error
        except RayActorError as error:
            text = str(error)
            if "ConfigError" in text:
                raise ConfigError(_last_line(text).split("ConfigError: ")[-1]) from error
            cause = error.__cause__ or getattr(error, "cause", None) or error
            raise WorkerLost(f"{self.name} died: {_last_line(str(cause))}") from error


@contextlib.asynccontextmanager
async def heartbeats(seats: Sequence[Seat], every_s: float, deadline_s: float) -> AsyncIterator[None]:
    """Ping every seat's actor every so often, for as long as the context lasts."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(every_s)
            await asyncio.gather(*(seat.check(deadline_s) for seat in seats))

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def are_arguments_lost(error: BaseException) -> bool:
    """Whether a call failed because an object of it went down with a node."""
    return isinstance(error.cause if isinstance(error, RayTaskError) else error, ObjectLostError)


async def _value(answer: Awaitable[Result]) -> Result:
    return await answer


def first_line(error: BaseException | None) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), "")


def _last_line(text: str) -> str:
    return next(iter(reversed(text.strip().splitlines())), "")
