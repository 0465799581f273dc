"""A worker's two ends: what its actors answer, and how the driver asks one actor, or the ranks of one model."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from stage_ray.signals import unblock_signals

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
RANKS_GRACE_S = 10.0  # where one rank fails the others do too, from the same cause or because they miss it
ANSWER_GRACE_S = 0.5  # a driver whose loop was blocked beyond the limit looks once more, for an answer that came


class WorkerLost(Exception):
    """A worker that cannot be used any more: it died, hung or was too slow. One sentence."""


class WorkerLate(WorkerLost):
    """It gave no answer in time."""


class WorkerFailed(WorkerLost):
    """It lives but raised, or answered what cannot be used."""


class WorkerDied(WorkerLost):
    """Its process ended: by itself, with its node, or because it answered no ping."""


class ActorNotReady(WorkerLost):
    """It was lost before a call's turn came; its successor is not ready yet."""


class NoWorkersLeft(WorkerLost):
    """A pool has no worker, and gets none."""


class ArgumentsLost(Exception):
    """What a call was about went down with a node; the worker is as good as before."""


class Worker:
    """Base class of the actors: answers pings on a thread of its own (Ray's concurrency group ``health``).

    Attributes:
        threads: of each concurrency group of Ray that the methods of a role name.
    """

    threads: ClassVar[Mapping[str, int]] = {"health": 1}

    @ray.method(concurrency_group="health")
    def ping(self) -> tuple[int, str]:
        """Process id and Ray's node id; both say which process to kill when it stops answering."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def address(self) -> str:
        """Where the other ranks meet this one: HOST:PORT."""
        return free_address(ray.util.get_node_ip_address())

    def setup(self, address: str = "") -> None:
        """Load what takes time; one of several ranks first meets the others at ``address``."""


@contextmanager
def loading() -> Iterator[None]:
    """No garbage collection while a worker loads what stays, and none of that later.

    The collector would walk millions of objects of torch and vLLM again and again: up to a fifth of a worker's start.
    """
    unblock_signals()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Client:
    """Asks one worker: an actor, or the ranks of a group, which live and die together."""

    def __init__(self, *ranks: Any, name: str = "", placement: PlacementGroup | None = None) -> None:
        """``ranks``: actor handles, rank 0 first; ``placement``: what Ray reserved for them; `kill` gives it back."""
        self._ranks, self._name, self._placement = ranks, name, placement

    @property
    def first(self) -> Self:
        """Rank 0 alone, where it answers for all."""
        return type(self)(self._ranks[0])

    def ask(
        self, method: Callable[Concatenate[Any, Arguments], Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Awaitable[Result]:
        """Ask every rank; rank 0's answer, once all have answered. The calls are queued at once."""
        return self._together([getattr(rank, method.__name__).remote(*args, **kwargs) for rank in self._ranks])

    def ask_objects(
        self, method: Callable[..., Iterable[Any]], count: int, *args: Any, **named: Any
    ) -> tuple[Awaitable[Any], list[Any]]:
        """Ask for an answer and ``count`` > 0 objects: the answer to come, and rank 0's references."""
        methods = [getattr(rank, method.__name__).options(num_returns=1 + count) for rank in self._ranks]
        answers = [method.remote(*args, **named) for method in methods]
        return self._together([first for first, *_ in answers]), answers[0][1:]

    async def setup(self) -> None:
        """Let the worker load its model; several ranks meet first."""
        addresses = [await self.first.ask(Worker.address)] if len(self._ranks) > 1 else []
        await self.ask(Worker.setup, *addresses)

    def kill(self) -> None:
        """End every rank, even one that is stopped: Ray ends what runs in a placement group that is removed."""
        for rank in self._ranks:
            ray.kill(rank)
        if self._placement is not None:
            remove_placement_group(self._placement)

    async def _together(self, answers: Sequence[Awaitable[Result]]) -> Result:
        """The first rank's answer, once all are there, or the error of one."""
        tasks = [asyncio.ensure_future(answer) for answer in answers]
        try:
            _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if waiting:
                _, waiting = await asyncio.wait(tasks, timeout=RANKS_GRACE_S)
            errors = [error for task in tasks if task.done() and (error := task.exception()) is not None]
            for error in errors:
                if isinstance(error, RayActorError):  # a rank died, whatever the others say about missing it
                    raise error
            if waiting:  # a rank failed, and another one waits for it
                lost = f"{self._name}: {len(errors)} of {len(tasks)} ranks failed: {errors[0]}"
                raise WorkerLost(lost) from errors[0]
            if errors:  # every rank refused, or failed
                raise errors[0]
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()


async def in_time(answer: Awaitable[Result], timeout_s: float | None, late: str) -> Result:
    """An answer, if it is there after ``timeout_s`` seconds, else a WorkerLate that says ``late``; None waits for ever.

    `asyncio.wait_for` gives up an answer that came while the driver's own loop was blocked beyond the limit. Here the
    loop first gets to see it: a worker is not to be killed for what the driver did.
    """
    task = asyncio.ensure_future(answer)
    try:
        for limit_s in (timeout_s, ANSWER_GRACE_S):
            if (await asyncio.wait({task}, timeout=limit_s))[0]:  # it is done
                return task.result()
        raise WorkerLate(late)
    finally:
        if task.cancel():
            await asyncio.gather(task, return_exceptions=True)


def free_address(host: str) -> str:
    """HOST:PORT of a port that is free there now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def first_line(error: BaseException | str) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), "")
