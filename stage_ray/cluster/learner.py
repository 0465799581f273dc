"""The run's learner: who may call it, for how long, and what its loss is called."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import ObjectLostError

from stage_ray.actors.client import ArgumentsLost, Client, WorkerFailed, WorkerLost
from stage_ray.actors.supervised import Ask, SupervisedActor
from stage_ray.config import RunConfig
from stage_ray.errors import GroupsLostError, LearnerLostError, RunError
from stage_ray.files import FileDigest
from stage_ray.records import GroupRefs, Update
from stage_ray.workers.learner import Drift, LearnerWorker

Result = TypeVar("Result")
Alone = Callable[[], AbstractAsyncContextManager[None]]  # while it lasts, colocated workers leave their GPUs


class ClusterLearner:
    """The supervised learner of a run: `LearnerWorker`'s methods, in turn.

    Every method raises LearnerLostError where the learner died or hung, in this call or in one before, and RunError
    where it refused (a loss that is not finite, say); those that take groups raise GroupsLostError where some are gone,
    with the node that held them, and then take none. Invariant: a learner that replaces a lost one is asked for
    nothing before `accept`; its caller gives it its state back.
    """

    def __init__(self, run: RunConfig, start: Callable[[str], Client], alone: Alone, hint: str) -> None:
        """Start the learner, named by ``start``'s argument, without waiting for it; ``hint``: where its log is."""
        self._timeout_s, self._alone, self._hint = run.learner.timeout_s, alone, hint
        self._accepted = 0

        async def setup(client: Client) -> None:
            async with alone():
                await client.setup()

        self.actor = SupervisedActor(
            "learner", start, start_timeout_s=run.cluster.start_timeout_s, setup=setup, keep_failed=True
        )

    async def update(self, groups: Sequence[GroupRefs]) -> Update:
        """Hand groups over, then train on them: one update, whose version is one more than the last."""

        async def update(client: Client) -> Update:
            async with self._alone():
                return await client.ask(LearnerWorker.update)

        # A call of its own, so that an object that is lost keeps no rank from an update that others are in.
        await self.call(lambda client: client.ask(LearnerWorker.set_batch, *_objects(groups)), groups=groups)
        return await self.call(update)

    async def drift(
        self, groups: Sequence[GroupRefs], directory: Path, *, images: int, anchor: bool
    ) -> tuple[Drift, Drift]:
        """As `LearnerWorker.drift`."""
        arguments = directory.resolve(), images, anchor, *(group.tokens for group in groups)

        async def drift(client: Client) -> tuple[Drift, Drift]:
            async with self._alone():
                return await client.ask(LearnerWorker.drift, *arguments)

        return await self.call(drift, groups=groups)

    async def save_state(self, directory: Path) -> dict[str, FileDigest]:
        """Write what an exact resume needs; what went into shards, by path."""
        return await self.call(lambda client: client.ask(LearnerWorker.save_state, directory.resolve()))

    async def load_state(self, directory: Path) -> int:
        """Take a saved state; its version."""
        return await self.call(lambda client: client.ask(LearnerWorker.load_state, directory.resolve()))

    async def save_batch(self, directory: Path) -> None:
        """Write the groups of the last update, which the learner still holds."""
        await self.call(lambda client: client.first.ask(LearnerWorker.save_groups, directory.resolve()))

    async def save_groups(self, directory: Path, groups: Sequence[GroupRefs]) -> None:
        """Write groups."""
        if groups:
            arguments = directory.resolve(), *_objects(groups)
            await self.call(lambda client: client.first.ask(LearnerWorker.save_groups, *arguments), groups=groups)

    async def load_groups(self, directory: Path, group_ids: Sequence[int]) -> list[GroupRefs]:
        """Read saved groups back into the object store, in the order of ``group_ids``."""

        async def load(client: Client) -> list[GroupRefs]:
            arguments = directory.resolve(), group_ids
            answer, refs = client.first.ask_objects(LearnerWorker.load_groups, 2 * len(group_ids), *arguments)
            loaded = zip(group_ids, await answer, refs[::2], refs[1::2], strict=True)  # groups and scores alternate
            return [GroupRefs(i, version, tokens, scores=(scores,)) for i, version, tokens, scores in loaded]

        return await self.call(load) if group_ids else []

    async def export(self, directory: Path) -> None:
        """Write a Hugging Face checkpoint that plain transformers loads."""
        await self.call(lambda client: client.ask(LearnerWorker.export, directory.resolve()))

    def accept(self) -> None:
        """Take the learner that is there now for the run's, new or not."""
        self._accepted = self.actor.restarts

    def require_accepted(self) -> None:
        """Raise LearnerLostError where the learner was replaced since the last `accept`."""
        if self.actor.restarts != self._accepted:
            raise LearnerLostError(f"the learner was lost before; {self._hint}")

    async def call(
        self, ask: Ask[Client, Result], *, groups: Sequence[GroupRefs] = (), patient: bool = False
    ) -> Result:
        """Call the learner when it is this call's turn, about ``groups``; ``patient``: the call has its own limits."""

        async def ask_accepted(client: Client) -> Result:
            self.require_accepted()
            return await ask(client)

        try:
            return await self.actor.call(ask_accepted, None if patient else self._timeout_s)
        except WorkerFailed as failed:
            raise RunError(f"{failed}; {self._hint}") from failed
        except WorkerLost as lost:
            raise LearnerLostError(f"{lost}; {self._hint}") from lost
        except ArgumentsLost as lost:
            if not groups:
                raise
            raise GroupsLostError(await missing(groups)) from lost


def _objects(groups: Sequence[GroupRefs]) -> list[Any]:
    """Rollout groups, each followed by its scored groups: Ray resolves references only where they are arguments."""
    return [ref for group in groups for ref in (group.tokens, *group.scores)]


async def missing(groups: Sequence[GroupRefs]) -> list[int]:
    """Ids of the groups whose payload is gone. Only here does the driver fetch any: to see if it can."""
    found = []
    for group in groups:
        try:
            await asyncio.gather(*(ref for ref in (group.tokens, group.images, *group.scores) if ref is not None))
        except ObjectLostError:
            found.append(group.group_id)
    return found
