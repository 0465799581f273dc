"""Ranks that share one model (a learner's, a rollout worker's), asked as if they were one actor.

They live and die together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stage_ray.actors.supervised import WorkerLost

GRACE_S = 10.0
"""Where one rank fails the others do too, from the same cause or because they miss it; so long they have for it."""
FIRST_ALONE = {"chunks", "open_group", "send", "version", "save_groups", "save_batch", "load_groups", "address"}
"""Calls that one rank answers for all."""


class RankGroup:
    """Looks like an actor to a `SupervisedActor`: ``team.update.remote()`` asks every rank, rank 0's counts.

    Ray places all of them or none (a placement group).

    Example:
        team = RankGroup("learner", 4, {"CPU": 8, "GPU": 1}, lambda rank, where: Learner.options(**where).remote(rank))
        await team.setup()
        await team.update.remote()
    """

    def __init__(
        self,
        name: str,
        count: int,
        bundle: Mapping[str, float],
        start: Callable[[int, Mapping[str, Any]], Any],
        *,
        one_node: bool = False,
    ) -> None:
        """Start the actors, without waiting for them.

        Args:
            name: for messages.
            count: ranks.
            bundle: what one rank reserves.
            start: makes an actor, given its rank and the options that place it.
            one_node: all on one machine, or none; else as close together as there is room.
        """
        self._name = name
        self._group = placement_group([dict(bundle)] * count, strategy="STRICT_PACK" if one_node else "PACK")
        self._actors = [start(rank, self.place(rank)) for rank in range(count)]

    def __getattr__(self, method: str) -> RankGroupCall:
        return RankGroupCall(self._name, self._actors, method)

    def place(self, rank: int) -> dict[str, Any]:
        """Options of an actor that lives in this rank's bundle: this rank, or one that shares it and its fate."""
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, rank)}

    async def setup(self) -> None:
        """Let the ranks find each other and load the model."""
        address = await self.address.remote() if len(self._actors) > 1 else ""
        await RankGroupCall(self._name, self._actors, "setup").remote(address)

    def end(self) -> None:
        """End every rank, even one that is stopped: Ray ends what runs in a placement group that is removed."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)


async def setup(worker: Any) -> None:
    """Let an actor load its model, or the ranks of a `RankGroup` find each other and load theirs."""
    await (worker.setup() if isinstance(worker, RankGroup) else worker.setup.remote())


def end(worker: Any) -> None:
    """End an actor, or every one of a `RankGroup`."""
    if isinstance(worker, RankGroup):
        worker.end()
    else:
        ray.kill(worker)


class RankGroupCall:
    """One method of every rank."""

    def __init__(self, team: str, actors: Sequence[Any], method: str, options: Mapping[str, Any] | None = None) -> None:
        self._team, self._actors, self._method, self._options = team, actors, method, dict(options or {})

    def options(self, **options: Any) -> RankGroupCall:
        """As of an actor's method."""
        return RankGroupCall(self._team, self._actors, self._method, options)

    def remote(self, *arguments: Any) -> Any:
        """What the first rank's method gives: a reference, or several with ``num_returns``.

        Of a call that all ranks answer the (first) one stands for every rank: it can be awaited, once.
        """
        actors = self._actors[:1] if self._method in FIRST_ALONE else self._actors
        answers = [getattr(actor, self._method).options(**self._options).remote(*arguments) for actor in actors]
        if len(answers) == 1:
            return answers[0]
        if isinstance(answers[0], list):
            return [_together(self._team, [first for first, *_ in answers]), *answers[0][1:]]
        return _together(self._team, answers)


async def _together(team: str, answers: Sequence[Awaitable[Any]]) -> Any:
    """The first answer, once all are there.

    Raises:
        RayActorError: a rank died, whatever the others say about missing it.
        WorkerLost: a rank failed, and another one waits for it.
        RayTaskError: every rank refused, or failed; the first one's reason.
    """
    tasks = [asyncio.ensure_future(_value(answer)) for answer in answers]
    try:
        _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if waiting:
            _, waiting = await asyncio.wait(tasks, timeout=GRACE_S)
        errors = [error for task in tasks if task.done() and (error := task.exception()) is not None]
        death = next((error for error in errors if isinstance(error, RayActorError)), None)
        if death is not None:
            raise death
        if waiting:
            raise WorkerLost(f"{team}: {len(errors)} of {len(tasks)} ranks failed: {errors[0]}") from errors[0]
        if errors:
            raise errors[0]
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def _value(answer: Awaitable[Any]) -> Any:
    return await answer
