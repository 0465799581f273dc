"""Pictures are decoded beside the next batch; a worker that is lost while it decodes is a lost worker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from stage_ray.errors import RunError
from stage_ray.records import Prompt, RolloutRequest
from tests.actors.local_actor import LocalCluster, Roles, local_actors, run_of  # noqa: F401

REQUESTS = [RolloutRequest(group_id, Prompt(0, "a ring"), (1, 2)) for group_id in (0, 1)]


class Decoder:
    """Samples at once; decodes as long as a test wants, ``how`` it wants."""

    def __init__(self, roles: Decoders, name: str) -> None:
        self._roles, self._name = roles, name

    async def setup(self) -> None:
        """It is ready."""

    async def generate(self, *requests: RolloutRequest) -> tuple[Any, ...]:
        self._roles.note(f"{self._name} samples {requests[0].group_id}")
        await self._roles.sampling(self._name)
        return ((0, 0.1, None, *("" for _ in requests)), *(f"group {request.group_id}" for request in requests))

    async def decode(self, *groups: str) -> tuple[Any, ...]:
        self._roles.note(f"{self._name} decodes {groups[0]}")
        await self._roles.decoding(self._name)
        self._roles.note(f"{self._name} decoded {groups[0]}")
        return (None, *(f"pictures of {group}" for group in groups))

    async def sleep(self) -> tuple[()]:
        self._roles.note(f"{self._name} sleeps")
        return ()


class Decoders(Roles):
    """Workers that say what they do, and wait in it for what a test gives them."""

    def __init__(self) -> None:
        super().__init__(lambda name: Decoder(self, name))
        self.noted = asyncio.Condition()
        self.sampling: Callable[[str], Awaitable[object]] = lambda name: asyncio.sleep(0)
        self.decoding: Callable[[str], Awaitable[object]] = lambda name: asyncio.sleep(0)
        self._told: dict[str, asyncio.Event] = {}

    def note(self, what: str) -> None:
        self.calls.append(what)
        self.event(what).set()

    def event(self, what: str) -> asyncio.Event:
        return self._told.setdefault(what, asyncio.Event())

    async def until(self, what: str) -> None:
        async with asyncio.timeout(60):
            await self.event(what).wait()


async def started(**changes: Any) -> tuple[Decoders, LocalCluster]:
    roles = Decoders()
    cluster = LocalCluster(run_of(**{"pipeline": {"max_staleness": 1}, **changes}), roles)
    await cluster.rollouts.ready()
    return roles, cluster


def scenario(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 120))  # type: ignore[arg-type]


def test_the_next_batch_is_sampled_while_pictures_are_decoded(local_actors):  # noqa: F811
    async def work() -> None:
        roles, cluster = await started()
        roles.decoding = lambda name: roles.until("rollout-0 samples 1")  # which it would wait for in vain
        first, second = await asyncio.gather(*(cluster.generate([request]) for request in REQUESTS))
        assert await first[0].images == "pictures of group 0" and await second[0].images == "pictures of group 1"
        assert cluster.restarts() == 0
        await cluster.rollouts.close()

    scenario(work)


def test_a_worker_that_dies_while_it_decodes_is_replaced_and_its_groups_are_drawn_again(local_actors):  # noqa: F811
    async def work() -> None:
        roles, cluster = await started()

        async def dies(name: str) -> None:
            if name == "rollout-0":
                roles.actors[name].kill()

        roles.decoding = dies
        again: list[int] = []
        groups = await cluster.generate(REQUESTS, on_retry=lambda: again.append(1))
        assert again == [1] and [await group.images for group in groups] == [
            "pictures of group 0",
            "pictures of group 1",
        ]
        assert roles.calls[-1] == "rollout-0-restart-1 decoded group 0" and cluster.restarts() == 1
        await cluster.rollouts.close()

    scenario(work)


def test_two_batches_of_a_worker_that_cannot_decode_are_drawn_by_one_successor(local_actors):  # noqa: F811
    async def work() -> None:
        roles, cluster = await started()

        async def fails(name: str) -> None:
            if name == "rollout-0":
                await roles.until("rollout-0 samples 1")  # it has its turn, and ends with its worker
                raise ValueError("no picture")

        async def waits(name: str) -> None:
            if name == "rollout-0" and "rollout-0 samples 1" in roles.calls:
                await asyncio.Event().wait()

        roles.decoding, roles.sampling = fails, waits
        groups = await asyncio.gather(*(cluster.generate([request]) for request in REQUESTS))
        assert [await group.images for (group,) in groups] == ["pictures of group 0", "pictures of group 1"]
        assert list(roles.actors).count("rollout-0-restart-1") == 1 and cluster.restarts() == 1
        await cluster.rollouts.close()

    scenario(work)


def test_pictures_that_no_worker_can_decode_end_the_run_with_the_reason(local_actors):  # noqa: F811
    async def work() -> None:
        roles, cluster = await started()

        async def fails(name: str) -> None:
            raise ValueError("no picture")

        roles.decoding = fails
        with pytest.raises(RunError, match="rollout-0 failed: ValueError: no picture"):
            await cluster.generate(REQUESTS)
        assert cluster.restarts() == cluster.run.cluster.attempts
        await cluster.rollouts.close()

    scenario(work)


def test_a_colocated_worker_decodes_before_it_sleeps(local_actors):  # noqa: F811
    async def work() -> None:
        roles, cluster = await started(
            rollout={"colocated": True, "gpus": 0.5}, learner={"gpus": 0.5}, pipeline={"max_staleness": 0}
        )
        decoding = asyncio.Event()
        roles.decoding = lambda name: decoding.wait()

        async def leave() -> None:
            async with cluster._without_rollouts():
                roles.note("the learner has the GPU")

        drawing = asyncio.ensure_future(cluster.generate(REQUESTS))
        await roles.until("rollout-0 decodes group 0")
        leaving = asyncio.ensure_future(leave())
        await asyncio.sleep(0)
        decoding.set()
        await asyncio.gather(drawing, leaving)
        assert roles.calls[-3:] == ["rollout-0 decoded group 0", "rollout-0 sleeps", "the learner has the GPU"]
        await cluster.rollouts.close()

    scenario(work)
