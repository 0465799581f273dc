"""What the cluster asks of whom, in which order and how often. Actors of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from stage_ray.config import RunConfig
from stage_ray.config.load import validate_config
from stage_ray.errors import LearnerLostError, RunError
from stage_ray.records import GroupRefs
from stage_ray.workers.rollout import RolloutWorker
from tests.actors.local_actor import LocalCluster, Roles, local_actors, run_of  # noqa: F401

pytestmark = pytest.mark.usefixtures("local_actors")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage_ray.actors.supervised.FIRST_PAUSE_S", 0.01)


async def asked(roles: Roles, call: str, count: int = 1) -> None:
    """Wait until it was asked for so often."""
    async with asyncio.timeout(60):
        while roles.calls.count(call) < count:
            await asyncio.sleep(0.01)


async def soon(work: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(work, 60)


GROUP = [GroupRefs(0, 0, "tokens", "images")]


@pytest.mark.parametrize(("deaths", "ok"), [(2, True), (3, False)])
def test_reward_workers_that_die_over_a_group_cost_it_no_attempt_of_its_scorers(deaths, ok):
    async def scenario() -> None:
        roles = Roles()
        names = ["reward-0" + (f"-restart-{death}" if death else "") for death in range(deaths)]
        roles.takes |= {f"{name} score": 3600.0 for name in names}
        cluster = LocalCluster(run_of(scoring={"timeout_s": 3600.0}), roles)
        await cluster.rewards.ready()
        scoring = asyncio.create_task(cluster.score(GROUP))
        for name in names:
            await asked(roles, f"{name} score")
            roles.actors[name].kill()
        [group] = await soon(scoring)
        assert (not group.error) is ok and [await ref for ref in group.scores] == ["scores"] * ok
        assert ok or "died: it was killed" in group.error
        await cluster.rewards.close()

    asyncio.run(scenario())


def test_a_scorer_that_is_too_slow_costs_its_groups_an_attempt():
    async def scenario() -> None:
        roles = Roles()
        roles.takes["score"] = 60.0
        cluster = LocalCluster(run_of(), roles)
        await cluster.rewards.ready()
        [group] = await soon(cluster.score(GROUP))
        assert group.error == "reward-0 gave no answer within 0.2 s"
        assert roles.calls.count("reward-0-restart-1 score") == 0
        await cluster.rewards.close()

    asyncio.run(scenario())


def test_where_no_reward_worker_is_left_the_run_ends_and_no_group_is_blamed():
    async def scenario() -> None:
        cluster = LocalCluster(run_of(cluster={"start_timeout_s": 0.2}), Roles())
        cluster.rewards.actors[0].stop()
        with pytest.raises(RunError, match=r"no reward worker is left and none started within 0.2 s"):
            await soon(cluster.score(GROUP))

    asyncio.run(scenario())


GROUPS = [GroupRefs(i, 0, "tokens", "images") for i in range(2)]


def two_pools() -> RunConfig:
    """A scorer in the common pool, and one with two workers that take a group at a time and have longer for it."""
    own = {"type": "geneval", "workers": 2, "groups_per_call": 1, "timeout_s": 1.0}
    return validate_config(run_of().model_dump(mode="json") | {"rewards": [{"type": "clip"}, own]})


def test_a_scorer_with_its_own_workers_gets_a_group_at_once_and_keeps_no_other_scorer_waiting():
    async def scenario() -> None:
        roles = Roles()
        slow = [f"reward-geneval-{i} score" for i in range(2)]
        roles.takes |= dict.fromkeys(slow, 60.0)
        cluster = LocalCluster(two_pools(), roles)
        await cluster.rewards.ready()
        waiting = [asyncio.create_task(cluster.score(GROUPS)) for _ in range(2)]
        await asked(roles, "reward-0 score done", 2)
        assert all(call in roles.calls for call in slow) and not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await cluster.rewards.close()

    asyncio.run(scenario())


def test_a_group_has_the_scores_of_every_pool_and_a_pool_takes_no_more_groups_at_once_than_it_may():
    async def scenario() -> None:
        roles = Roles()
        cluster = LocalCluster(two_pools(), roles)
        await cluster.rewards.ready()
        scored = await soon(cluster.score(GROUPS))
        assert [(group.group_id, group.error, len(group.scores)) for group in scored] == [(0, "", 2), (1, "", 2)]
        asked_for = sorted(call for call in roles.calls if call.endswith(" score"))
        assert asked_for == ["reward-0 score", "reward-geneval-0 score", "reward-geneval-1 score"]
        assert cluster.workers()["reward"] == 3
        await cluster.rewards.close()

    asyncio.run(scenario())


def test_where_one_pool_of_several_gives_no_answer_only_its_groups_have_its_error_and_no_scores():
    async def scenario() -> None:
        roles = Roles()
        roles.takes["reward-geneval-1 score"] = 60.0
        cluster = LocalCluster(two_pools(), roles)
        await cluster.rewards.ready()
        good, bad = sorted(await soon(cluster.score(GROUPS)), key=lambda group: group.error)
        assert (good.error, len(good.scores)) == ("", 2)
        assert (bad.error, bad.scores) == ("reward-geneval-1 gave no answer within 1 s", ())
        await cluster.rewards.close()

    asyncio.run(scenario())


COLOCATED = {"rollout": {"colocated": True, "workers": 2}, "learner": {"ranks": 2}}


def while_learner(roles: Roles, does: str) -> list[str]:
    """What workers were asked for, or were at, while the learner did something for the last time."""
    ends = roles.calls[::-1].index(f"learner {does} done"), roles.calls[::-1].index(f"learner {does}")
    return roles.calls[len(roles.calls) - ends[1] : len(roles.calls) - ends[0] - 1]


def at(roles: Roles, call: str) -> int:
    return roles.calls.index(call)


def test_colocated_workers_load_while_their_gpus_are_empty_and_sleep_while_the_learner_loads_and_works():
    async def scenario() -> None:
        roles = Roles()
        roles.takes |= {"setup": 0.05, "sleep": 0.05, "update": 0.05, "rollout-1 ping": 0.1}
        cluster = LocalCluster(run_of(**COLOCATED), roles)
        await soon(cluster._setup())
        for worker in ("rollout-0", "rollout-1"):
            assert at(roles, f"{worker} setup done") < at(roles, f"{worker} sleep")
            assert at(roles, f"{worker} sleep done") < at(roles, "learner setup")
        roles.calls.clear()
        await soon(cluster.learner.update(GROUP))
        for worker in ("rollout-0", "rollout-1"):
            assert at(roles, f"{worker} sleep done") < at(roles, "learner update")
        assert while_learner(roles, "update") == []
        await cluster.rollouts.close()

    asyncio.run(scenario())


def test_a_colocated_successor_loads_before_or_after_an_update_and_never_meanwhile():
    async def scenario() -> None:
        roles = Roles()
        cluster = LocalCluster(run_of(**COLOCATED), roles)
        await soon(cluster._setup())
        roles.takes |= {"setup": 0.2, "update": 0.3}
        first = cluster.rollouts.actors[0]
        first.restart()
        cluster.rollouts.refill(first)
        await asked(roles, "rollout-0-restart-1 setup")
        update = asyncio.create_task(cluster.learner.update(GROUP))
        await asked(roles, "learner update")
        assert at(roles, "rollout-0-restart-1 setup done") < at(roles, "rollout-0-restart-1 sleep")
        assert at(roles, "rollout-0-restart-1 sleep") < at(roles, "learner update")
        first.restart()
        cluster.rollouts.refill(first)
        batch = asyncio.create_task(
            cluster.rollouts.call(lambda worker: worker.ask(RolloutWorker.generate), 5.0, turn=1)
        )
        await soon(update)
        assert while_learner(roles, "update") == [], "neither a start nor a batch, which would wake a worker"
        await soon(asyncio.gather(batch, asked(roles, "rollout-0-restart-2 setup done")))
        await cluster.rollouts.close()

    asyncio.run(scenario())


def test_a_colocated_learner_that_is_lost_comes_back_while_workers_sleep_or_wait():
    async def scenario() -> None:
        roles = Roles()
        cluster = LocalCluster(run_of(**COLOCATED), roles)
        await soon(cluster._setup())
        roles.takes |= {"setup": 0.2, "update": 60.0}
        update = asyncio.create_task(cluster.learner.update(GROUP))
        await asked(roles, "learner update")
        for name in ("learner", "rollout-0"):  # those of one GPU go together
            roles.actors[name].kill()
        with pytest.raises(LearnerLostError):
            await soon(update)
        cluster.learner.accept()
        roles.calls.clear()
        await soon(cluster.learner.load_state(Path("nowhere")))
        started = [call.split()[0] for call in roles.calls if call.endswith(" setup")]
        assert started[0] == "learner-restart-1"
        assert at(roles, "rollout-1 sleep done") < at(roles, "learner-restart-1 setup")
        await asked(roles, "rollout-0-restart-1 setup done")
        assert at(roles, "learner-restart-1 setup done") < at(roles, "rollout-0-restart-1 setup")
        await cluster.rollouts.close()

    asyncio.run(scenario())
