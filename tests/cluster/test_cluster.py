"""What the cluster asks of whom, in which order and how often. Actors of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from stage_ray.cluster.cluster import GroupRefs
from stage_ray.errors import RunError
from tests.cluster.local_actor import LocalCluster, Roles, local_actors, run_of  # noqa: F401

pytestmark = pytest.mark.usefixtures("local_actors")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage_ray.cluster.pool.FIRST_PAUSE_S", 0.01)


async def asked(roles: Roles, call: str, count: int = 1) -> None:
    """Wait until it was asked for so often."""
    async with asyncio.timeout(5):
        while roles.calls.count(call) < count:
            await asyncio.sleep(0.01)


async def soon(work: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(work, 5)


GROUP = [GroupRefs(0, 0, "tokens", "images")]


@pytest.mark.parametrize(("deaths", "ok"), [(2, True), (3, False)])
def test_reward_workers_that_die_over_a_group_cost_it_no_attempt_of_its_scorers(deaths, ok):
    async def scenario() -> None:
        roles = Roles()
        roles.takes["score"] = 0.1
        cluster = LocalCluster(run_of(), roles)
        await cluster.rewards.ready()
        scoring = asyncio.create_task(cluster.score(GROUP))
        for death in range(deaths):
            name = "reward-0" + (f"-restart-{death}" if death else "")
            await asked(roles, f"{name} score")
            roles.actors[name].kill()
        [(receipt, group)] = await soon(scoring)
        assert receipt.ok is ok and (await group.scores == "scores" if ok else group.scores is None)
        assert ok or "died: it was killed" in receipt.error
        await cluster.rewards.close()

    asyncio.run(scenario())


def test_a_scorer_that_is_too_slow_costs_its_groups_an_attempt():
    async def scenario() -> None:
        roles = Roles()
        roles.takes["score"] = 60.0
        cluster = LocalCluster(run_of(), roles)
        await cluster.rewards.ready()
        [(receipt, _)] = await soon(cluster.score(GROUP))
        assert not receipt.ok and receipt.error == "reward-0 gave no answer within 0.2 s"
        assert roles.calls.count("reward-0-restart-1 score") == 0
        await cluster.rewards.close()

    asyncio.run(scenario())


def test_where_no_reward_worker_is_left_the_run_ends_and_no_group_is_blamed():
    async def scenario() -> None:
        cluster = LocalCluster(run_of(cluster={"start_timeout_s": 0.2}), Roles())
        cluster.rewards.seats[0].vacate()
        with pytest.raises(RunError, match=r"no reward worker is left and none started within 0.2 s"):
            await soon(cluster.score(GROUP))

    asyncio.run(scenario())
