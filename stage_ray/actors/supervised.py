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
GRACE_S = 0.5
"""A driver whose loop was blocked finds limit and answer together: so long after the limit it looks once more."""


async def _nothing(*about: Any) -> None:
    """There is nothing to do."""


class WorkerLost(Exception):
    """An actor that cannot be used any more: it died, hung or was too slow. One sentence."""


class WorkerFailed(WorkerLost):
    """An actor that lives but raised, or answered what cannot be used."""


class WorkerDied(WorkerLost):
    """An actor whose process ended: by itself, with its node, or because it answered no ping."""


class ActorNotReady(WorkerLost):
    """The seat's actor was lost before this call's turn came; its successor is not ready yet."""


class ArgumentsLost(Exception):
    """What a call was about went down with a node; the actor is as good as before."""


class SupervisedActor:
    """One actor after another; one call at a time, in the order in which the calls came.

    Invariant: calls reach the actor in the order of `call`, across replacements too, because they queue at a fair lock.
    So a wave that was asked for before a weight update is drawn before it, and which version draws which group is
    settled when it is asked for. Whoever asked may go: the actor works on, so the seat stays taken until it is done.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[str], Any],
        *,
        start_timeout_s: float,
        setup: Callable[[Any], Awaitable[Any]] = _nothing,
        sync: Callable[[str, Any], Awaitable[Any]] = _nothing,
        keep_failed: bool = False,
        kill: Callable[[Any], None] = ray.kill,
        on_loss: Callable[[SupervisedActor], object] = lambda seat: None,
    ) -> None:
        """Start the first actor, without waiting for it.

        Args:
            name: for logs and messages; later actors get a number after it.
            start: makes an actor, given its name, that answers pings as soon as there is room for it.
            start_timeout_s: seconds that `setup` may take.
            begin: what an actor does once (load its model).
            prepare: what it must do then, before its first call (load the newest weights), given the seat's name too;
                it sets limits of its own.
            keep_failed: an actor that raised is kept: its state is worth more than a fresh start.
            kill: ends an actor.
            on_loss: called when a call lost the actor and its successor is starting, also when nobody waits for the
                call any more.
        """
        self.name = name
        self.restarts = 0
        self.busy_s = 0.0
        self.waiting = 0
        self._start, self._start_timeout_s = start, start_timeout_s
        self._setup, self._sync = setup, sync
        self._keep_failed, self._kill, self._on_loss = keep_failed, kill, on_loss
        self._lock = asyncio.Lock()
        self._pid: int | None = None
        self.is_ready = False
        self.started = False  # it has begun, and takes the newest of what `sync` gives it
        self._actor = start(name)

    async def start(self, timeout_s: float | None) -> None:
        """`ready`, before any call that comes once there is room for the actor; ``timeout_s`` None: whenever that is.

        Raises:
            WorkerLost, ConfigError, ArgumentsLost: as `ready`.
        """
        await self._answer(self._actor.ping.remote(), timeout_s)  # outside the lock: this may take for ever
        async with self._lock:
            await self.ready(self._start_timeout_s)

    async def ready(self, timeout_s: float | None) -> None:
        """Wait until the actor has a process, at most ``timeout_s``, has begun and is prepared.

        Raises:
            ConfigError: what it found wrong with the config.
            WorkerLost: it died, failed, or needs too long.
            ArgumentsLost: what it is to be prepared with is gone.
        """
        if self.is_ready:
            return
        pid, node = await self._answer(self._actor.ping.remote(), timeout_s)
        self._pid = pid if node == _this_node() else None
        if not self.started:
            try:
                await self._answer(self._setup(self._actor), self._start_timeout_s)
            except WorkerFailed as failed:
                raise WorkerLost(str(failed)) from failed  # it has no state yet that would be worth to be kept
            self.started = True
        await self._answer(self._sync(self.name, self._actor), None)
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
            WorkerLost, WorkerFailed, WorkerDied: another actor is starting in the seat.
            ActorNotReady: it was lost before, and ``if_ready``.
            ArgumentsLost: an object of the call is gone; nothing was asked.
            ConfigError: an actor found the config wrong.
        """
        self.waiting += 1
        try:
            await self._lock.acquire()
        except asyncio.CancelledError:
            self.waiting -= 1
            raise
        turn = asyncio.ensure_future(self._turn(ask, timeout_s, if_ready))
        turn.add_done_callback(self._turn_over)
        return await asyncio.shield(turn)

    @contextlib.asynccontextmanager
    async def exclusive(self, ask: Callable[[Any], Awaitable[Any]], timeout_s: float) -> AsyncIterator[None]:
        """Let the actor do one thing, then keep it from everything for as long as the context lasts.

        Where none has begun none begins meanwhile; the successor of one that is lost over ``ask`` waits as well.
        """
        async with self._lock:
            if self.started:
                try:
                    await self._answer(ask(self._actor), timeout_s)
                except WorkerLost as lost:
                    self._lose(lost)
            yield

    async def _turn(self, ask: Callable[[Any], Awaitable[Result]], timeout_s: float | None, if_ready: bool) -> Result:
        if if_ready and not self.is_ready:
            raise ActorNotReady(f"{self.name} was lost before its turn came")
        try:
            await self.ready(self._start_timeout_s)
            began = time.perf_counter()
            answer = await self._answer(ask(self._actor), timeout_s)
            self.busy_s += time.perf_counter() - began
            return answer
        except WorkerLost as lost:
            if not (self._keep_failed and isinstance(lost, WorkerFailed)):
                self._lose(lost)
            raise

    def _turn_over(self, turn: asyncio.Future[Any]) -> None:
        self.waiting -= 1
        self._lock.release()

    def _lose(self, lost: WorkerLost) -> None:
        log.warning("%s; another takes its seat", lost)
        self.restart()
        self._on_loss(self)

    def restart(self) -> None:
        """Kill the actor, if there is one, and start another."""
        self.stop()
        self.restarts += 1
        self._actor = self._start(f"{self.name}-restart-{self.restarts}")

    def stop(self) -> None:
        """Kill the actor and leave the seat empty until `restart`."""
        self.kill()
        self.is_ready = self.started = False
        self._actor = None

    def kill(self) -> None:
        """End the actor's process, even one that is stopped."""
        if self._actor is not None:
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
            await in_time(actor.ping.remote(), deadline_s)
        except TimeoutError:
            if actor is self._actor and self.is_ready:
                log.warning("%s: no heartbeat for %g s, so it is killed", self.name, deadline_s)
                self.kill()
        except (RayError, WorkerLost):  # the second from a `RankGroup`
            return  # it is dead: whoever calls it finds out

    async def _answer(self, answer: Awaitable[Result], timeout_s: float | None) -> Result:
        try:
            return await in_time(answer, timeout_s)
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
            cause = error.__cause__ or getattr(error, "cause", None) or error
            raise WorkerDied(f"{self.name} died: {_last_line(str(cause))}") from error


@contextlib.asynccontextmanager
async def heartbeats(seats: Sequence[SupervisedActor], every_s: float, deadline_s: float) -> AsyncIterator[None]:
    """Ping every seat's actor every so often, for as long as the context lasts.

    Where that cannot go on, whatever runs in the context is cancelled and the context raises the reason: a run whose
    actors nobody watches might wait for ever.
    """
    body = asyncio.current_task()
    assert body is not None

    async def watch() -> None:
        while True:
            await asyncio.sleep(every_s)
            await asyncio.gather(*(seat.check(deadline_s) for seat in seats))

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.error("nobody watches the workers any more, so the run ends", exc_info=task.exception())
            body.cancel()

    task = asyncio.create_task(watch())
    task.add_done_callback(ended)
    try:
        yield
    except asyncio.CancelledError:
        if task.done() and not task.cancelled():
            body.uncancel()
            task.result()
        raise
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def in_time(answer: Awaitable[Result], timeout_s: float | None) -> Result:
    """An answer, if it is there after ``timeout_s`` seconds; None waits for ever.

    `asyncio.wait_for` gives up an answer that came while the driver's own loop was blocked beyond the limit. Here the
    loop first gets to see it: a worker is not to be killed for what the driver did.

    Raises:
        TimeoutError: it is not there.
    """
    task = asyncio.ensure_future(_value(answer))
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
        if not done:
            done, _ = await asyncio.wait({task}, timeout=GRACE_S)
        if not done:
            raise TimeoutError
        return task.result()
    finally:
        if task.cancel():
            await asyncio.gather(task, return_exceptions=True)


def are_arguments_lost(error: BaseException) -> bool:
    """Whether a call failed because an object of it went down with a node."""
    return isinstance(error.cause if isinstance(error, RayTaskError) else error, ObjectLostError)


def _this_node() -> str:
    return str(ray.get_runtime_context().get_node_id())


async def _value(answer: Awaitable[Result]) -> Result:
    return await answer


def first_line(error: BaseException | None) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), "")


def _last_line(text: str) -> str:
    return next(iter(reversed(text.strip().splitlines())), "")
