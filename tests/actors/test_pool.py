"""A pool goes on with the actors it has and takes in those that come later. Real Ray actors."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
import ray

from stage_ray.actors.client import Client, Worker, WorkerLost
from stage_ray.actors.supervised import Pool
from stage_ray.cluster.placement import actor_of


class Counter(Worker):
    """Answers with its name, or dies."""

    def __init__(self, name: str) -> None:
        self.name = name

    def who(self) -> str:
        return self.name

    def pid(self) -> int:
        return os.getpid()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module", autouse=True)
def one_ray():
    ray.init(address="local", num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def pool(least: int, most: int | None, cpus: float = 0.5, **more) -> Pool:
    options = {"start_timeout_s": 60.0, "attempts": 2} | more
    return Pool("test", least, most, lambda name: Client(actor_of(Counter, cpus, 0, {}).remote(name)), **options)


def who(worker):
    return worker.ask(Counter.who)


def test_a_call_whose_actor_dies_goes_to_another_and_the_seat_is_refilled():
    async def scenario():
        members = pool(2, None)
        await members.ready()
        dead: list[int] = []

        def first_dies(worker):
            dead.append(1)
            return worker.ask(Counter.die) if len(dead) == 1 else worker.ask(Counter.who)

        assert await members.call(first_dies, 30, turn=0, attempts=2) == "test-1"
        async with asyncio.timeout(60):
            while len(members.open) < 2:
                await asyncio.sleep(0.05)
        answers = {await members.call(who, 30, turn=turn) for turn in range(2)}
        assert answers == {"test-0-restart-1", "test-1"}
        await members.close()
        for actor in members.actors:
            actor.kill()

    asyncio.run(scenario())


def test_more_actors_than_there_is_room_for_wait_without_being_in_the_way_and_join_when_there_is():
    async def scenario():
        blocker = actor_of(Counter, 1, 0, {}).remote("blocker")
        await blocker.ping.remote()
        members = pool(1, 2, cpus=1)
        await members.ready()
        assert [await members.call(who, 30, turn=turn) for turn in range(2)] == ["test-0", "test-0"]
        ray.kill(blocker)
        async with asyncio.timeout(60):
            while len(members.open) < 2:
                await asyncio.sleep(0.05)
        assert {await members.call(who, 30, turn=turn) for turn in range(2)} == {"test-0", "test-1"}
        await members.close()
        for actor in members.actors:
            actor.kill()

    asyncio.run(scenario())


def test_a_pool_that_nobody_can_join_says_so_in_time():
    async def scenario():
        members = pool(1, None, cpus=64, start_timeout_s=1.0)
        with pytest.raises(WorkerLost, match="no test worker is left and none started within 1 s"):
            await members.call(who, 30)
        members.actors[0].kill()

    asyncio.run(scenario())


def test_actors_that_die_on_every_call_end_in_a_clear_error():
    async def scenario():
        members = pool(1, None)
        await members.ready()
        with pytest.raises(WorkerLost, match="test-0 died"):
            await members.call(lambda worker: worker.ask(Counter.die), 30, attempts=2)
        await members.close()
        members.actors[0].kill()

    asyncio.run(scenario())
