"""A version whose bytes went down with the learner's node: workers keep what they serve and wait for the next one."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import ray
from ray.exceptions import ObjectLostError

from stage_ray.actors.supervised import LOST_PAUSE_S
from stage_ray.cluster.runtime import start_ray
from tests.weights_case import ROW, SyncCluster, SyncLearner, SyncRolloutWorker, run_of

BYTES = 500 * ROW


@ray.remote(num_cpus=0)
class Owner:
    """Takes what it holds along when it dies, as a node does."""

    def hold(self, count: int) -> list:
        return [ray.put(b"x" * 200_000) for _ in range(count)]


async def lost_objects(count: int) -> tuple:
    owner = Owner.remote()
    objects = await owner.hold.remote(count)
    ray.kill(owner)
    for _ in range(100):
        try:
            ray.get(objects[0])
        except ObjectLostError:
            return tuple(objects)
        await asyncio.sleep(0.1)
    raise AssertionError("the objects outlive their owner")


async def publish_lose_publish(cluster: SyncCluster) -> None:
    async def served() -> list[list[float]]:
        return [await a.call(lambda w: w.ask(SyncRolloutWorker.loaded), 60) for a in cluster.rollouts.actors]

    async def next_version() -> None:
        await cluster.publish(await cluster.learner.call(lambda learner: learner.ask(SyncLearner.advance)))

    await asyncio.gather(cluster.rollouts.ready(), cluster.learner.actor.ready(None))
    await next_version()
    assert await served() == [[1.0], [1.0]]

    published = cluster.transport.published
    cluster.transport.published = replace(published, chunks=await lost_objects(len(published.chunks)))
    await asyncio.gather(*(cluster.transport.load(actor) for actor in cluster.rollouts.actors))
    assert await served() == [[1.0], [1.0]] and cluster.restarts() == 0

    late = cluster.rollouts.actors[0]
    late.restart()
    cluster.rollouts.refill(late)
    async with asyncio.timeout(240):  # however long its process takes to start on a busy machine
        while not late.started:
            await asyncio.sleep(0.05)
    await asyncio.sleep(3 * LOST_PAUSE_S)  # it looks for weights again and again
    assert late.started and not late.is_ready, "a new worker must not serve the weights of the config"
    await next_version()
    assert await served() == [[2.0], [2.0]]


@pytest.mark.slow
def test_no_worker_serves_a_version_that_is_not_whole_and_the_next_one_reaches_all(tmp_path):
    run = run_of(BYTES, "object_store")
    start_ray(run, tmp_path)
    try:
        asyncio.run(publish_lose_publish(SyncCluster(run, None, BYTES)))
    finally:
        ray.shutdown()
