"""A version that the learner finds unsound while it is stored: no worker hears of it, and the old one stays."""

from __future__ import annotations

import asyncio

import pytest
import ray

from stage_ray.actors.client import Client
from stage_ray.cluster.placement import actor_of
from stage_ray.cluster.runtime import start_ray
from stage_ray.errors import RunError
from tests.weights_case import ROW, SyncActors, SyncCluster, SyncLearner, SyncRolloutWorker, run_of

BYTES = 500 * ROW


class SpoiledLearner(SyncLearner):
    def spoil(self) -> None:
        """One value of the last tensor."""
        list(self._learner.weights())[-1][1][-1, -1] = float("nan")


class SpoiledActors(SyncActors):
    def learner(self, name: str) -> Client:
        return Client(actor_of(SpoiledLearner, 1, 0, {}).remote(*self._size, self._run))


class SpoiledCluster(SyncCluster):
    actors_class = SpoiledActors


async def publish_spoil_publish(cluster: SpoiledCluster) -> None:
    async def served() -> list[list[float]]:
        return [await a.call(lambda w: w.ask(SyncRolloutWorker.loaded), 60) for a in cluster.rollouts.actors]

    await cluster.setup()
    await cluster.publish(await cluster.learner.call(lambda learner: learner.ask(SyncLearner.advance)))
    assert await served() == [[1.0], [1.0]]
    before = cluster.transport.published
    await cluster.learner.call(lambda learner: learner.ask(SyncLearner.advance))
    await cluster.learner.call(lambda learner: learner.ask(SpoiledLearner.spoil))
    with pytest.raises(RunError, match=r"tensor 'layer.31.weight' of version 2 holds values that are not finite"):
        await cluster.publish(2)
    assert cluster.transport.published == before and cluster.transport.version == 1
    assert await served() == [[1.0], [1.0]] and cluster.restarts() == 0


@pytest.mark.slow
def test_a_version_that_is_not_finite_is_refused_while_it_is_stored_and_the_old_one_stays(tmp_path):
    run = run_of(BYTES, "object_store")
    start_ray(run, tmp_path)
    try:
        asyncio.run(publish_spoil_publish(SpoiledCluster(run, None, BYTES)))
    finally:
        ray.shutdown()
