"""Supervised actors: a worker that dies, hangs or fails is replaced behind its caller."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from stage_ray.actors.client import ArgumentsLost, Client, WorkerDied, WorkerFailed, WorkerLate, WorkerLost, in_time
from stage_ray.errors import ConfigError

log = logging.getLogger(__name__)
Result = TypeVar("Result")
C = TypeVar("C", bound=Client)
Ask = Callable[[C], Awaitable[Result]]
"""From a worker's client to the answer to come."""
Sync = Callable[[str, C], Awaitable[None]]
"""What a worker must do before its first call, given the actor's name and the client; it sets limits of its own."""


class ActorNotReady(WorkerLost):
    """The worker was lost before this call's turn came; its successor is not ready yet."""


class SupervisedActor(Generic[C]):
    """One worker after another; one call at a time, in the order in which the calls came.

    Invariant: calls reach the worker in the order of `call`, across replacements too, because they queue at a fair
    lock. So a generation batch that was asked for before a weight update is drawn before it, and which version draws
    which group is fixed when it is asked for. A caller may be cancelled: the worker works on, and stays taken until it
    is done.

    Attributes:
        restarts: workers replaced so far.
        busy_s: seconds of answered calls, since this was last set to zero.
        waiting: calls that are queued or under way.
        started: the worker has loaded its model, and takes the newest of what ``sync`` gives it.
        is_ready: it may be asked.
        lock: a call's turn. While another holds it the worker is asked by `ask` only, and no successor is set up.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[str], C],
        *,
        start_timeout_s: float,
        setup: Callable[[C], Awaitable[None]] = lambda client: client.setup(),
        sync: Sync[C] | None = None,
        keep_failed: bool = False,
        on_loss: Callable[[SupervisedActor[C]], None] = lambda actor: None,
    ) -> None:
        """Start the first worker, without waiting for it.

        Args:
            name: for logs and messages; later workers get a number after it.
            start: makes a worker, given its name, that answers pings as soon as there is room for it.
            start_timeout_s: seconds that ``setup`` may take.
            setup: what a worker does once (load its model).
            sync: what it does then (load the newest weights).
            keep_failed: a worker that raised is kept: its state is worth more than a fresh start.
            on_loss: called when a call lost the worker and its successor is starting, also when the caller was
                cancelled meanwhile.
        """
        self.name = name
        self.restarts, self.waiting, self.busy_s = 0, 0, 0.0
        self.started = self.is_ready = False
        self._start, self._start_timeout_s = start, start_timeout_s
        self._setup, self._sync = setup, sync
        self._keep_failed, self._on_loss = keep_failed, on_loss
        self.lock = asyncio.Lock()
        self._pid: int | None = None
        self._client: C | None = start(name)

    @property
    def client(self) -> C:
        """The worker that is asked now."""
        assert self._client is not None, f"{self.name} was stopped"
        return self._client

    async def ready(self, timeout_s: float | None) -> None:
        """Wait until the worker has a process, at most ``timeout_s``; then until it is set up and in sync.

        The latter comes before any call that comes once the worker has a process.

        Raises:
            ConfigError: what it found wrong with the config.
            WorkerLost: it died, failed, or needs too long.
            ArgumentsLost: what it is to be synced with is gone.
        """
        await self._answer(self.client.ping(), timeout_s)  # outside the lock: this may take for ever
        async with self.lock:
            await self._ready()

    async def _ready(self) -> None:
        if self.is_ready:
            return
        pid, node = await self._answer(self.client.ping(), self._start_timeout_s)
        self._pid = pid if node == ray.get_runtime_context().get_node_id() else None  # what `kill` may signal
        if not self.started:
            try:
                await self._answer(self._setup(self.client), self._start_timeout_s)
            except WorkerFailed as failed:
                raise WorkerLost(str(failed)) from failed  # it has no state yet that would be worth to be kept
            self.started = True
        if self._sync is not None:
            await self._answer(self._sync(self.name, self.client), None)
        self.is_ready = True

    async def call(self, ask: Ask[C, Result], timeout_s: float | None, *, if_ready: bool = False) -> Result:
        """Ask the worker when it is this call's turn. When it is lost another one is started, and is not asked.

        Args:
            ask: from the worker's client to the answer to come.
            timeout_s: seconds the answer may take once it is this call's turn; None waits for ever.
            if_ready: do not wait for a worker that is not ready when it is this call's turn.

        Raises:
            WorkerLost, WorkerFailed, WorkerDied: another worker is starting.
            ActorNotReady: it was lost before, and ``if_ready``.
            ArgumentsLost: an object of the call is gone; nothing was asked.
            ConfigError: a worker found the config wrong.
        """
        self.waiting += 1
        try:
            await self.lock.acquire()
        except asyncio.CancelledError:
            self.waiting -= 1
            raise
        # A task of its own, which keeps the lock to its end whatever becomes of the caller.
        return await asyncio.shield(asyncio.ensure_future(self._turn(ask, timeout_s, if_ready)))

    async def ask(self, ask: Ask[C, Result], timeout_s: float | None) -> Result:
        """Ask the worker where `lock` is held already; raises as `call`."""
        with self._replaced_if_lost():
            began = time.perf_counter()
            answer = await self._answer(ask(self.client), timeout_s)
            self.busy_s += time.perf_counter() - began
            return answer

    def restart(self) -> None:
        """Kill the worker, if there is one, and start another."""
        self.stop()
        self.restarts += 1
        self._client = self._start(f"{self.name}-restart-{self.restarts}")

    def stop(self) -> None:
        """Kill the worker and start none until `restart`."""
        self.kill()
        self.is_ready = self.started = False
        self._client = None

    def kill(self) -> None:
        """End the worker's process, even one that is stopped."""
        if self._client is not None:
            self._client.kill()
        if self._pid is not None:  # Ray asks the process itself, and a stopped one does not listen
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._pid, signal.SIGKILL)
        self._pid = None

    async def check(self, deadline_s: float) -> None:
        """Kill a worker that does not answer a ping in time; the call that waits for it then fails and replaces it."""
        if not self.is_ready:
            return
        client = self.client
        try:
            await in_time(client.ping(), deadline_s, f"{self.name}: no heartbeat for {deadline_s:g} s")
        except WorkerLate as late:
            if client is self._client and self.is_ready:  # not its successor, which has started meanwhile
                log.warning("%s, so it is killed", late)
                self.kill()
        except (RayError, WorkerLost):  # the second from several ranks
            return  # it is dead, and the next call finds out

    async def _turn(self, ask: Ask[C, Result], timeout_s: float | None, if_ready: bool) -> Result:
        try:
            if if_ready and not self.is_ready:
                raise ActorNotReady(f"{self.name} was lost before its turn came")
            with self._replaced_if_lost():
                await self._ready()
            return await self.ask(ask, timeout_s)
        finally:
            self.waiting -= 1
            self.lock.release()

    @contextlib.contextmanager
    def _replaced_if_lost(self) -> Iterator[None]:
        try:
            yield
        except WorkerLost as lost:
            if not (self._keep_failed and isinstance(lost, WorkerFailed)):
                log.warning("%s; another takes its place", lost)
                self.restart()
                self._on_loss(self)
            raise

    async def _answer(self, answer: Awaitable[Result], timeout_s: float | None) -> Result:
        """An answer, with Ray's errors as ours."""
        try:
            return await in_time(answer, timeout_s, f"{self.name} gave no answer within {timeout_s or 0:g} s")
        except (ObjectLostError, RayTaskError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, ObjectLostError):
                raise ArgumentsLost(f"{self.name}: {first_line(cause)}") from error
            if isinstance(cause, ConfigError):
                raise ConfigError(str(cause)) from error
            raise WorkerFailed(f"{self.name} failed: {type(cause).__name__}: {first_line(cause)}") from error
        except RayActorError as error:
            cause = error.__cause__ or getattr(error, "cause", None) or error
            last_line = (str(cause).strip().splitlines() or [""])[-1]
            raise WorkerDied(f"{self.name} died: {last_line}") from error


@contextlib.asynccontextmanager
async def heartbeats(actors: Sequence[SupervisedActor[Any]], every_s: float, deadline_s: float) -> AsyncIterator[None]:
    """Ping every actor every so often, for as long as the context lasts.

    Where that cannot go on, what runs in the context is cancelled and the context raises the reason: without
    heartbeats a run might wait for ever.
    """
    body = asyncio.current_task()
    assert body is not None

    async def watch() -> None:
        try:
            while True:
                await asyncio.sleep(every_s)
                await asyncio.gather(*(actor.check(deadline_s) for actor in actors))
        except Exception:
            log.exception("the workers get no heartbeats any more, so the run ends")
            body.cancel()
            raise

    task = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if task.done():  # it ended by itself, and cancelled the body
            body.uncancel()
            task.result()
        raise
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def first_line(error: BaseException | None) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), "")
