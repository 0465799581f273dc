"""A version that goes to every rollout worker at once, while some of them die, hang and join. Real actors and gloo."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import ray
import torch

from stage_ray.actors.client import Client
from stage_ray.actors.supervised import SupervisedActor
from stage_ray.cluster.placement import actor_of
from stage_ray.cluster.transport import Broadcast
from stage_ray.config import RunConfig
from stage_ray.config.load import validate_config
from stage_ray.errors import ConfigError, LearnerLostError
from stage_ray.records import TensorSpec, WeightManifest
from stage_ray.weights.manifest import WeightError
from stage_ray.weights.process_groups import BroadcastGroup, GroupMember
from stage_ray.workers.rollout import RolloutClient
from tests.weights_case import ROW, SyncActors, SyncCluster, SyncLearner, SyncRolloutWorker, run_of

SIZE = 200 * ROW
SOON = 4.0  # cluster.sync_timeout_s


class Trap(BroadcastGroup):
    """Takes a broadcast group over: its process ends, hangs or damages a tensor in the middle of the next version."""

    def __init__(self, group: BroadcastGroup, harm: str) -> None:
        super().__init__()
        self._member, self._group = group._member, group._group
        self._harm = harm
        self._left = 16

    def _broadcast(self, member: GroupMember, data: torch.Tensor, seconds: float) -> None:
        super()._broadcast(member, data, seconds)
        self._left -= 1
        if self._left == 0:
            if self._harm == "flip":
                data[7] ^= 1
            else:
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self._harm])


class Worker(SyncRolloutWorker):
    def trap(self, harm: str) -> None:
        self._group = Trap(self._group, harm)

    def policy_version(self) -> int:
        return self._engine.policy_version

    def work(self, seconds: float) -> None:
        time.sleep(seconds)

    def addresses(self) -> set[str]:
        """Where this process listens."""
        import psutil

        return {c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}


class Learner(SyncLearner):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._packed = 0

    def trap(self, harm: str) -> None:
        self._group = Trap(self._group, harm)

    def pack(self, dtype):
        self._packed += 1
        return super().pack(dtype)

    def packed(self) -> int:
        return self._packed

    def advance_slowly(self, seconds: float) -> int:
        time.sleep(seconds)
        return self.advance()


class TrappedActors(SyncActors):
    def rollout(self, name):
        return RolloutClient(actor_of(Worker, 0.5, 0, {}).remote(*self._size))

    def learner(self, name):
        return Client(actor_of(Learner, 0.5, 0, {}).remote(*self._size, self._run))


class TrappedCluster(SyncCluster):
    actors_class = TrappedActors

    async def versions(self) -> list[float]:
        """What each worker that can be asked holds."""
        found = []
        for actor in self.rollouts.open:
            values = await actor.call(lambda worker: worker.ask(Worker.loaded), 60)
            assert len(values) == 1, f"{actor.name} holds {values}"
            found += values
        return found

    async def whole(self) -> None:
        """Wait until every worker is ready."""
        await asyncio.wait_for(until(lambda: len(self.rollouts.open) == len(self.rollouts.actors)), 180)

    async def begin_next(self) -> None:
        await self.publish(await self.learner.call(lambda learner: learner.ask(Learner.advance)))

    async def next(self) -> None:
        await self.begin_next()
        await self.settle()

    async def on(self, index: int, method: str, *arguments):
        return await self.rollouts.actors[index].call(lambda w: w.ask(getattr(Worker, method), *arguments), 60)

    async def packed(self) -> int:
        return await self.learner.call(lambda learner: learner.ask(Learner.packed))


def run_with(workers: int) -> RunConfig:
    data = run_of(SIZE, "gloo").model_dump(mode="json")
    data["rollout"] |= {"workers": workers}
    data["pipeline"] |= {"max_staleness": 1}
    data["cluster"] |= {"sync_timeout_s": SOON, "start_timeout_s": 180.0}
    return validate_config(data)


@pytest.fixture(scope="module", autouse=True)
def one_ray():
    before = os.environ.pop("GLOO_SOCKET_IFNAME", None)
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"prestart_worker_first_driver": False},  # one for each CPU, which has no use
    )
    yield
    ray.shutdown()
    if before is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = before


@contextmanager
def cluster_of(workers: int) -> Iterator[tuple[asyncio.Runner, TrappedCluster]]:
    async def start() -> TrappedCluster:
        cluster = TrappedCluster(run_with(workers), None, SIZE)
        await asyncio.gather(cluster.rollouts.ready(), cluster.learner.actor.ready(180))
        return cluster

    with asyncio.Runner() as runner:
        cluster = runner.run(start())
        yield runner, cluster
        runner.run(cluster.rollouts.close())
        for actor in cluster.actors():
            actor.kill()


@pytest.fixture(scope="module")
def standing() -> Iterator[tuple[asyncio.Runner, TrappedCluster]]:
    with cluster_of(workers=3) as both:
        yield both


@pytest.fixture
def play(standing):
    """Play a scenario on three workers that share a version, whatever the one before has left."""
    runner, cluster = standing

    async def begin() -> float:
        await cluster.whole()
        await cluster.next()
        assert await cluster.versions() == [cluster.transport.version] * 3
        return float(cluster.transport.version)

    def play(scenario) -> float:
        version = runner.run(begin())
        runner.run(scenario(cluster, version))
        return version

    return play


def test_every_worker_gets_every_version_over_one_group_and_nothing_is_stored(play):
    async def scenario(cluster, version):
        packed, group = await cluster.packed(), cluster.transport._number
        for ahead in (1, 2, 3):
            await cluster.next()
            assert await cluster.versions() == [version + ahead] * 3
            assert [await cluster.on(i, "policy_version") for i in range(3)] == [version + ahead] * 3
        assert cluster.transport._number == group, "members did not change, and neither did the group"
        assert await cluster.packed() == packed
        node = ray.util.get_node_ip_address()
        assert node in await cluster.on(0, "addresses")

    play(scenario)


@pytest.mark.parametrize("harm", ["kill", "stop", "flip"])
def test_a_worker_that_fails_in_the_middle_of_a_version_costs_no_worker_the_version(harm, play, monkeypatch, caplog):
    monkeypatch.setattr("stage_ray.cluster.transport.GRACE_S", 1.0)  # of one that is stopped, and gets no heartbeat

    async def scenario(cluster, version):
        packed, group = await cluster.packed(), cluster.transport._number
        await cluster.on(1, "trap", harm)
        began = time.monotonic()
        await cluster.next()
        assert time.monotonic() - began < 10 * SOON
        assert set(await cluster.versions()) == {version + 1}
        assert len(cluster.rollouts.open) >= 2
        assert await cluster.packed() == packed + 1, "once, for those who did not get it"
        await cluster.whole()
        assert await cluster.versions() == [version + 1] * 3, "the successor has it before its first request"
        await cluster.next()
        assert await cluster.versions() == [version + 2] * 3
        groups = cluster.transport._number - group
        assert groups == 1 if harm == "flip" else groups >= 1

    version = play(scenario)
    late = f"did not take version {version + 1:.0f} within cluster.sync_timeout_s = 4 s; another takes its place"
    assert (f"rollout-1 {late}" in caplog.messages) == (harm == "stop")


def test_a_learner_that_dies_in_the_middle_of_a_version_is_named_and_its_successor_publishes(play):
    async def scenario(cluster, version):
        cluster.busy()
        await cluster.learner.call(lambda learner: learner.ask(Learner.trap, "kill"))
        with pytest.raises(LearnerLostError):
            await cluster.next()
        assert await cluster.versions() == [version] * 3, "half a version touches nothing"
        assert 0 <= cluster.busy()["rollout"] < 10 * SOON, "seconds, and not the hour of the clock"
        cluster.learner.accept()
        await cluster.next()  # the successor begins at version 0
        assert await cluster.versions() == [1.0] * 3
        await cluster.next()
        assert await cluster.versions() == [2.0] * 3

    play(scenario)


def test_a_worker_that_joins_between_versions_gets_the_newest_and_takes_part_in_the_next(play):
    async def scenario(cluster, version):
        packed = await cluster.packed()
        newcomer = cluster.rollouts.actors[1]
        newcomer.restart()
        assert not newcomer.is_ready
        await cluster.next()
        assert await cluster.versions() == [version + 1] * 2
        cluster.rollouts.refill(newcomer)
        await cluster.whole()
        assert await cluster.versions() == [version + 1] * 3 and await cluster.packed() == packed + 1
        await cluster.next()
        assert await cluster.versions() == [version + 2] * 3 and await cluster.packed() == packed + 1

    play(scenario)


def test_no_worker_waits_in_a_transfer_while_a_worker_draws_for_longer_than_a_transfer_may_take(play):
    async def scenario(cluster, version):
        packed, restarts, group = await cluster.packed(), cluster.restarts(), cluster.transport._number
        cluster.busy()
        batch = asyncio.create_task(cluster.on(0, "work", 2.5 * SOON))
        await asyncio.sleep(0.1)
        await cluster.begin_next()
        await cluster.settle()
        assert batch.done()
        assert await cluster.versions() == [version + 1] * 3
        assert (await cluster.packed(), cluster.restarts(), cluster.transport._number) == (packed, restarts, group)
        assert cluster.busy()["learner"] < 2 * SOON, "it waited, and that is no work"

    play(scenario)


def test_a_worker_that_dies_in_the_batch_before_a_version_is_not_waited_for(play, caplog):
    async def scenario(cluster, version):
        batch = asyncio.create_task(cluster.on(0, "work", 60.0))
        await asyncio.sleep(0.1)
        await cluster.begin_next()
        began = time.monotonic()
        cluster.rollouts.actors[0].kill()
        await cluster.settle()
        assert time.monotonic() - began < 30 and "did not take version" not in caplog.text
        assert await cluster.versions() == [version + 1] * 2
        with pytest.raises(Exception, match="rollout-0"):
            await batch

    play(scenario)


def test_a_worker_that_comes_too_late_for_a_version_waits_for_the_next_even_if_it_is_the_only_worker():
    """The learner has moved on in place; what was published last is nowhere."""

    async def scenario(cluster):
        await cluster.next()
        updating = asyncio.create_task(cluster.learner.call(lambda learner: learner.ask(Learner.advance_slowly, 8.0)))
        await asyncio.sleep(0.1)
        cluster.rollouts.actors[0].restart()
        cluster.rollouts.refill(cluster.rollouts.actors[0])
        version = await updating
        assert not cluster.rollouts.open
        await cluster.publish(version)
        await asyncio.wait_for(cluster.settle(), 180)
        await asyncio.wait_for(cluster.rollouts.wait_any(), 180)
        assert await cluster.versions() == [2.0]

    with cluster_of(workers=1) as (runner, cluster):
        runner.run(scenario(cluster))


def test_workers_that_a_learner_never_sent_to_were_not_busy():
    async def scenario():
        async def learner_is_lost(ask, *, patient=False):
            if not patient:
                return WeightManifest(1, (), 0)
            await asyncio.sleep(0.1)
            raise LearnerLostError("it died")

        actor = SupervisedActor("rollout-0", lambda name: Client(), start_timeout_s=1.0)
        actor.started = actor.is_ready = True
        broadcast = Broadcast(SimpleNamespace(call=learner_is_lost, actor=actor), 1.0, "gloo")
        await broadcast.publish([actor])
        await asyncio.sleep(0)
        waiting = asyncio.create_task(actor.call(lambda worker: asyncio.sleep(0, "asked"), None))
        await asyncio.sleep(0.05)
        assert not waiting.done(), "it is held for the learner"
        assert await broadcast.settled()
        assert await waiting == "asked" and 0 <= actor.busy_s < 0.1

    asyncio.run(scenario())


def test_a_worker_without_memory_for_a_version_breaks_the_group_and_is_served_by_the_store():
    group = BroadcastGroup()
    member = GroupMember(1, group.open("127.0.0.1", 10.0), 0, 1, "gloo", 10.0)
    small = TensorSpec("small", (4,), "float32", 0, 0, 16, "")
    huge = TensorSpec("huge", (2**58,), "float32", 0, 1, 2**60, "")
    with pytest.raises(WeightError, match="rank 0 of 1: .*memory"):
        group.receive(member, WeightManifest(1, (small, huge), 1))


def test_nccl_without_a_gpu_for_each_end_is_refused():
    data = run_of(SIZE, "gloo").model_dump(mode="json")
    data["cluster"]["weight_transport"] = "nccl"
    data["rollout"]["gpus"] = 0.5
    with pytest.raises(ConfigError, match=r"weight_transport = nccl .* rollout.gpus = 0.5 and learner.gpus = 0;"):
        validate_config(data)
    data["rollout"]["gpus"] = data["learner"]["gpus"] = 1
    validate_config(data)


async def until(what) -> None:
    while not what():
        await asyncio.sleep(0.05)
