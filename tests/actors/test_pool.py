"""A pool goes on with the actors it has and takes in those that come later. Real Ray actors."""

from __future__ import annotations

import asyncio

import pytest
import ray

from stage_ray.actors.client import Client, WorkerLost
from stage_ray.actors.supervised import Pool
from stage_ray.cluster.placement import actor_of
from tests.actors.named import Named


@pytest.fixture(scope="module", autouse=True)
def one_ray():
    ray.init(address="local", num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def pool(least: int, most: int | None, cpus: float = 0.5, **more) -> Pool:
    options = {"start_timeout_s": 60.0, "attempts": 2} | more
    return Pool("test", least, most, lambda name: Client(actor_of(Named, cpus, 0, {}).remote(name)), **options)


def name_of(worker):
    return worker.ask(Named.name)


def test_a_call_whose_actor_dies_goes_to_another_and_the_lost_one_is_refilled():
    async def scenario():
        workers = pool(2, None)
        await workers.ready()
        dead: list[int] = []

        def first_dies(worker):
            dead.append(1)
            return worker.ask(Named.die) if len(dead) == 1 else worker.ask(Named.name)

        assert await workers.call(first_dies, 30, turn=0, attempts=2) == "test-1"
        async with asyncio.timeout(60):
            while len(workers.open) < 2:
                await asyncio.sleep(0.05)
        answers = {await workers.call(name_of, 30, turn=turn) for turn in range(2)}
        assert answers == {"test-0-restart-1", "test-1"}
        await workers.close()
        for actor in workers.actors:
            actor.kill()

    asyncio.run(scenario())


def test_more_actors_than_there_is_room_for_wait_without_being_in_the_way_and_join_when_there_is():
    async def scenario():
        blocker = actor_of(Named, 1, 0, {}).remote("blocker")
        await blocker.ping.remote()
        workers = pool(1, 2, cpus=1)
        await workers.ready()
        assert [await workers.call(name_of, 30, turn=turn) for turn in range(2)] == ["test-0", "test-0"]
        ray.kill(blocker)
        async with asyncio.timeout(60):
            while len(workers.open) < 2:
                await asyncio.sleep(0.05)
        assert {await workers.call(name_of, 30, turn=turn) for turn in range(2)} == {"test-0", "test-1"}
        await workers.close()
        for actor in workers.actors:
            actor.kill()

    asyncio.run(scenario())


def test_a_pool_that_no_worker_can_join_says_so_in_time():
    async def scenario():
        workers = pool(1, None, cpus=64, start_timeout_s=1.0)
        with pytest.raises(WorkerLost, match="no test worker is left and none started within 1 s"):
            await workers.call(name_of, 30)
        workers.actors[0].kill()

    asyncio.run(scenario())


def test_actors_that_die_on_every_call_end_in_a_clear_error():
    async def scenario():
        workers = pool(1, None)
        await workers.ready()
        with pytest.raises(WorkerLost, match="test-0 died"):
            await workers.call(lambda worker: worker.ask(Named.die), 30, attempts=2)
        await workers.close()
        workers.actors[0].kill()

    asyncio.run(scenario())
