"""Supervised actors, alone or in the pool of a role: a worker that is lost is replaced behind its caller."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError, RuntimeEnvSetupError

from stage_ray.actors.client import (
    ActorNotReady,
    ArgumentsLost,
    Client,
    NoWorkersLeft,
    Worker,
    WorkerDied,
    WorkerFailed,
    WorkerLate,
    WorkerLost,
    first_line,
    in_time,
)
from stage_ray.errors import ConfigError

log = logging.getLogger(__name__)
Result = TypeVar("Result")
C = TypeVar("C", bound=Client)
Ask = Callable[[C], Awaitable[Result]]  # from a worker's client to the answer to come
Sync = Callable[[str, C], Awaitable[None]]  # from the actor's name and the client; it sets limits of its own
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # between starts of one actor that fail: each is twice the one before
LOST_PAUSE_S = 1.0  # between two looks whether there is something to sync with again


class SupervisedActor(Generic[C]):
    """One worker after another; one call at a time.

    Invariant: calls reach the worker in the order of `call`, across replacements too, because they queue at a fair
    lock. So a generation batch that was asked for before a weight update is drawn before it, and which version draws
    which group is fixed when it is asked for. A caller may be cancelled: the worker stays taken until it is done.

    Methods that ask the worker raise WorkerLate, WorkerFailed or WorkerDied where it is lost, ArgumentsLost where an
    object that it needs is gone (it is as good as before), and ConfigError for what it found wrong with the config.
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
            start: makes a worker, given its name, that answers pings as soon as there is room for it.
            start_timeout_s: seconds that ``setup`` may take.
            setup: what a worker does once (load its model).
            sync: what it does then, before its first call (load the newest weights).
            keep_failed: a worker that raised is kept: its state is worth more than a fresh start.
            on_loss: called when a call lost the worker, though its caller be cancelled, and its successor is starting.
        """
        self.name = name
        self.client = start(name)  # the worker that is asked now
        self.lock = asyncio.Lock()  # while another holds it, only `ask` asks the worker, and no successor is set up
        self.started = False  # it has loaded its model, and takes the newest of what ``sync`` gives it
        self.is_ready = False  # it may be asked
        self.waiting = 0  # calls that are queued or under way
        self.restarts = 0
        self.failed_starts = 0  # in a row, as its pool counts them
        self.busy_s = 0.0  # of answered calls, since this was last set to zero
        self._start, self._start_timeout_s = start, start_timeout_s
        self._setup, self._sync, self._keep_failed, self._on_loss = setup, sync, keep_failed, on_loss
        self._pid: int | None = None

    async def ready(self, timeout_s: float | None) -> None:
        """Wait at most ``timeout_s`` until the worker has a process; then set it up and sync it, before later calls."""
        await self._answer(self.client.ask(Worker.ping), timeout_s)  # outside the lock: this may take for ever
        async with self.lock:
            await self._ready()

    async def _ready(self) -> None:
        if self.is_ready:
            return
        pid, node = await self._answer(self.client.ask(Worker.ping), self._start_timeout_s)
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

        From then on the answer may take ``timeout_s``, None: for ever. ``if_ready``: raise ActorNotReady where the
        worker is not ready then, instead of setting it up.
        """
        self.waiting += 1
        try:
            await self.lock.acquire()
        except asyncio.CancelledError:
            self.waiting -= 1
            raise
        # A task of its own, which keeps the lock to its end whatever becomes of the caller.
        return await asyncio.shield(asyncio.ensure_future(self._turn(ask, timeout_s, if_ready)))

    async def ask(self, ask: Ask[C, Result], timeout_s: float | None, *, setup: bool = False) -> Result:
        """Ask the worker, after its ``setup`` if that is wanted, where `lock` is held already; raises as `call`."""
        try:
            if setup:
                await self._ready()
            began = time.perf_counter()
            answer = await self._answer(ask(self.client), timeout_s)
            self.busy_s += time.perf_counter() - began
            return answer
        except WorkerLost as lost:
            if not (self._keep_failed and isinstance(lost, WorkerFailed)):
                self._replace(lost)
            raise

    async def finish(self, client: C, rest: Awaitable[object], timeout_s: float | None) -> None:
        """Wait for what a ``client`` still does for a call whose turn is over, beside its next ones; raises as `call`.

        What it needs is its own, so an object that is gone is its loss too.
        """
        try:
            await self._answer(rest, timeout_s)
        except (WorkerLost, ArgumentsLost) as lost:
            if client is self.client and self.lock.locked():
                self.kill()  # the call that has its turn fails, and replaces it
            elif client is self.client:
                self._replace(lost)
            raise lost if isinstance(lost, WorkerLost) else WorkerDied(str(lost)) from lost

    def _replace(self, lost: Exception) -> None:
        log.warning("%s; another takes its place", lost)
        self.restart()
        self._on_loss(self)

    def restart(self) -> None:
        """Kill the worker, if there is one, and start another."""
        self.stop()
        self.restarts += 1
        self.client = self._start(f"{self.name}-restart-{self.restarts}")

    def stop(self) -> None:
        """Kill the worker and start none until `restart`."""
        self.kill()
        self.is_ready = self.started = False

    def kill(self) -> None:
        """End the worker's process, even one that is stopped."""
        self.client.kill()
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
            await in_time(client.ask(Worker.ping), deadline_s, f"{self.name}: no heartbeat for {deadline_s:g} s")
        except WorkerLate as late:
            if client is self.client and self.is_ready:  # not its successor, which has started meanwhile
                log.warning("%s, so it is killed", late)
                self.kill()
        except (RayError, WorkerLost):  # the second from several ranks
            pass  # it is dead, and the next call finds out

    async def _turn(self, ask: Ask[C, Result], timeout_s: float | None, if_ready: bool) -> Result:
        try:
            if if_ready and not self.is_ready:
                raise ActorNotReady(f"{self.name} was lost before its turn came")
            return await self.ask(ask, timeout_s, setup=True)
        finally:
            self.waiting -= 1
            self.lock.release()

    async def _answer(self, answer: Awaitable[Result], timeout_s: float | None) -> Result:
        try:
            return await in_time(answer, timeout_s, f"{self.name} gave no answer within {timeout_s or 0:g} s")
        except (ObjectLostError, RayTaskError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, ObjectLostError):
                raise ArgumentsLost(f"{self.name}: {first_line(cause)}") from error
            if isinstance(cause, ConfigError):
                raise ConfigError(str(cause)) from error
            raise WorkerFailed(f"{self.name} failed: {type(cause).__name__}: {first_line(cause)}") from error
        except (RayActorError, RuntimeEnvSetupError) as error:
            cause = error.__cause__ or getattr(error, "cause", None) or error
            _, _, last_line = str(cause).strip().rpartition("\n")
            raise WorkerDied(f"{self.name} died: {last_line}") from error


class Pool(Generic[C]):
    """Between ``least`` and ``most`` workers of one role: a call goes to one that is ready, a lost one is refilled.

    The first ``least`` must start with the run. The others, and the successors of lost ones, join whenever Ray finds
    room (an autoscaler sees them wait), and stay to the end. The run goes on while one worker is left, and waits
    ``start_timeout_s`` for the first to come back. A start that fails is tried again for ever.
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
        """Start every worker, without waiting for any; ``start``, ``start_timeout_s``, ``sync``: as `SupervisedActor`.

        ``most`` None: ``least``. ``attempts``: starts in a row that may fail in every actor before a run without any
        worker ends.
        """
        self.role = role
        self._least, self._attempts, self._start_timeout_s = least, attempts, start_timeout_s
        self._refills: dict[SupervisedActor[C], asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._failure: WorkerLost | ConfigError | None = None  # of the last start
        self._fault: BaseException | None = None  # a bug in the refilling itself
        self._turns = itertools.count(1)
        self.actors = [
            SupervisedActor(f"{role}-{i}", start, start_timeout_s=start_timeout_s, sync=sync, on_loss=self.refill)
            for i in range(most or least)
        ]

    @property
    def open(self) -> list[SupervisedActor[C]]:
        """The actors that can be asked now."""
        return [actor for actor in self.actors if actor.is_ready]

    async def ready(self) -> None:
        """Wait until the workers that the run needs are warm."""
        for actor in self.actors[self._least :]:
            self.refill(actor)
        await asyncio.gather(*(actor.ready(self._start_timeout_s) for actor in self.actors[: self._least]))

    async def call(
        self,
        ask: Ask[C, Result],
        timeout_s: float | None,
        *,
        rest: Callable[[Result], Awaitable[object]] | None = None,
        turn: int | None = None,
        attempts: int = 1,
        retry: type[WorkerLost] = WorkerLost,
        on_retry: Callable[[], None] = lambda: None,
    ) -> Result:
        """Ask one worker, and where it is lost another one, up to ``attempts`` times in all; raises as `wait_any` too.

        Args:
            rest: of an answer, what its worker still does for it once it may be asked again; waited for, too.
            turn: which of the open actors, modulo their number; None takes the one with the shortest queue.
            retry: which losses another attempt follows.
            on_retry: called before each further attempt.
        """

        async def asked(client: C) -> tuple[C, Result]:
            return client, await ask(client)

        while True:
            await self.wait_any()
            actors = self.open
            if turn is None:
                first = next(self._turns) % len(actors)  # of equal queues the first in this order: they take turns
                actor = min(actors[first:] + actors[:first], key=lambda actor: actor.waiting)
            else:
                actor = actors[turn % len(actors)]
            try:
                client, answer = await actor.call(asked, timeout_s, if_ready=True)
                if rest is not None:
                    await actor.finish(client, rest(answer), timeout_s)
                return answer
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
            ConfigError: what the worker that tried last found wrong with the config, where those starts failed.
        """
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while not (self.open or self._fault or all(a.failed_starts >= self._attempts for a in self.actors)):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            where = f"no {self.role} worker is left and none started within {self._start_timeout_s:g} s"
            why = f"the last one that tried: {self._failure}" if self._failure else "has the cluster room for one?"
            raise NoWorkersLeft(f"{where}: {why}") from self._failure
        if self._fault is not None:
            raise self._fault
        if not self.open and isinstance(self._failure, ConfigError):
            raise self._failure
        if not self.open:  # every actor failed too often
            raise NoWorkersLeft(f"no {self.role} worker is left and none starts: {self._failure}") from self._failure

    def refill(self, actor: SupervisedActor[C]) -> None:
        """Set an actor's worker up as soon as there is room for it."""
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
        while not actor.is_ready:
            try:
                await actor.ready(None)
                actor.failed_starts = 0
            except ArgumentsLost:  # the version that was newest went down with a node: the next one is as good
                await asyncio.sleep(LOST_PAUSE_S)
            except (ConfigError, WorkerLost) as failure:
                actor.stop()
                self._failure = failure
                if isinstance(failure, ConfigError):  # a successor would read the same config
                    log.error("%s: %s; its place stays empty", actor.name, failure)
                    actor.failed_starts = self._attempts
                    return
                log.warning("%s; another takes its place in %g s", failure, pause_s)
                actor.failed_starts += 1
                self._changed.set()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                actor.restart()

    def _refilled(self, task: asyncio.Task[None]) -> None:
        """A worker joined, or the refilling itself failed: then the next caller is told."""
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("the %s workers are not refilled any more", self.role, exc_info=fault)
            self._fault = fault
        self._changed.set()


@contextlib.asynccontextmanager
async def heartbeats(actors: Sequence[SupervisedActor[Any]], every_s: float, deadline_s: float) -> AsyncIterator[None]:
    """Ping every actor every so often, for as long as the context lasts.

    Where that cannot go on, the context is cancelled and raises the reason: a run without them might wait for ever.
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
