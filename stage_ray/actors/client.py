"""A worker as the driver asks it: one Ray actor, or several ranks that share one model; and the ways to lose it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from stage_ray.actors.worker import Worker

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
RANKS_GRACE_S = 10.0
"""Where one rank fails the others do too, from the same cause or because they miss it: how long they have for it."""
ANSWER_GRACE_S = 0.5
"""A driver whose loop was blocked finds limit and answer together: how long after the limit it looks once more."""


class WorkerLost(Exception):
    """A worker that cannot be used any more: it died, hung or was too slow. One sentence."""


class WorkerFailed(WorkerLost):
    """A worker that lives but raised, or answered what cannot be used."""


class WorkerDied(WorkerLost):
    """A worker whose process ended: by itself, with its node, or because it answered no ping."""


class ArgumentsLost(Exception):
    """What a call was about went down with a node; the worker is as good as before."""


class Client:
    """Asks one worker: an actor, or the ranks of a group, which live and die together.

    A role's client subclasses it; its methods name the methods of the role's actor.

    Example:
        class EchoClient(Client):
            def say(self, word: str) -> Awaitable[str]:
                return self.ask(EchoWorker.say, word)
    """

    def __init__(self, *ranks: Any, name: str = "", placement: PlacementGroup | None = None) -> None:
        """Take over the actors.

        Args:
            ranks: actor handles, rank 0 first.
            name: for messages about ranks.
            placement: what Ray reserved for them; it is given back by `kill`.
        """
        self._ranks, self._name, self._placement = ranks, name, placement

    def ask(
        self, method: Callable[Concatenate[Any, Arguments], Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Awaitable[Result]:
        """Ask every rank; rank 0's answer, once all have answered. The calls are queued at once."""
        return self._together([_call(rank, method, args, kwargs) for rank in self._ranks])

    def ask_first(
        self, method: Callable[Concatenate[Any, Arguments], Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Awaitable[Result]:
        """Ask rank 0 alone, which answers for all."""
        answer: Awaitable[Result] = _call(self._ranks[0], method, args, kwargs)
        return answer

    def ask_objects(
        self, method: Callable[..., tuple[Any, ...]], count: int, *arguments: Any, ranks: int | None = None
    ) -> tuple[Awaitable[Any], list[Any]]:
        """Ask (the first ``ranks``) for an answer and ``count`` > 0 objects: the answer to come, and references."""
        returned = {"num_returns": 1 + count}
        answers = [_call(rank, method, arguments, {}, returned) for rank in self._ranks[:ranks]]
        return self._together([first for first, *_ in answers]), answers[0][1:]

    def ping(self) -> Awaitable[tuple[int, str]]:
        """Process and node of rank 0, once every rank has answered."""
        return self.ask(Worker.ping)

    async def setup(self) -> None:
        """Let the worker load its model; several ranks meet first."""
        if len(self._ranks) == 1:
            await self.ask(Worker.setup)
        else:
            await self.ask(Worker.setup, await self.ask_first(Worker.address))

    def kill(self) -> None:
        """End every rank, even one that is stopped: Ray ends what runs in a placement group that is removed."""
        for rank in self._ranks:
            ray.kill(rank)
        if self._placement is not None:
            remove_placement_group(self._placement)

    def _together(self, answers: Sequence[Awaitable[Any]]) -> Awaitable[Any]:
        return answers[0] if len(answers) == 1 else together(self._name, answers)


def _call(
    rank: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, options: dict[str, Any] | None = None
) -> Any:
    remote = getattr(rank, method.__name__)
    return (remote.options(**options) if options else remote).remote(*args, **kwargs)


async def together(name: str, answers: Sequence[Awaitable[Result]]) -> Result:
    """The first rank's answer, once all are there.

    Raises:
        RayActorError: a rank died, whatever the others say about missing it.
        WorkerLost: a rank failed, and another one waits for it.
        RayTaskError: every rank refused, or failed; the first one's reason.
    """
    tasks = [asyncio.ensure_future(_value(answer)) for answer in answers]
    try:
        _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if waiting:
            _, waiting = await asyncio.wait(tasks, timeout=RANKS_GRACE_S)
        errors = [error for task in tasks if task.done() and (error := task.exception()) is not None]
        death = next((error for error in errors if isinstance(error, RayActorError)), None)
        if death is not None:
            raise death
        if waiting:
            raise WorkerLost(f"{name}: {len(errors)} of {len(tasks)} ranks failed: {errors[0]}") from errors[0]
        if errors:
            raise errors[0]
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


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
            done, _ = await asyncio.wait({task}, timeout=ANSWER_GRACE_S)
        if not done:
            raise TimeoutError
        return task.result()
    finally:
        if task.cancel():
            await asyncio.gather(task, return_exceptions=True)


async def _value(answer: Awaitable[Result]) -> Result:
    return await answer
