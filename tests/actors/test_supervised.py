"""Supervised actors and pools: what a call, a start and a heartbeat do to their workers. Actors of this process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from stage_ray.actors.client import NoWorkersLeft, WorkerDied, WorkerLost
from stage_ray.actors.supervised import Pool, SupervisedActor, heartbeats
from stage_ray.cluster.transport import ObjectStore, Publication
from stage_ray.errors import ConfigError
from stage_ray.workers.rollout import RolloutClient
from tests.actors.local_actor import LocalActor, local_actors  # noqa: F401

pytestmark = pytest.mark.usefixtures("local_actors")


class Worker:
    """Writes down what it does."""

    def __init__(self, name: str = "worker") -> None:
        self.name = name
        self.done: list[str] = []

    async def setup(self) -> None:
        self.done.append("setup")

    async def batch(self) -> None:
        """As a test wants actor."""

    async def work(self, what: str, seconds: float = 0.0) -> str:
        await asyncio.sleep(seconds)
        self.done.append(what)
        return self.name


class Starts:
    """Makes workers, and gives the first ones something else to do when they begin."""

    def __init__(self, *beginnings: Callable[[], Any]) -> None:
        self.beginnings = list(beginnings)
        self.actors: list[LocalActor] = []

    def __call__(self, name: str) -> RolloutClient:
        worker = Worker(name)
        if self.beginnings:
            worker.setup = self.beginnings.pop(0)  # type: ignore[method-assign]
        self.actors.append(LocalActor(worker))
        return RolloutClient(self.actors[-1])


async def fails() -> None:
    raise OSError("the GPU is not free yet")


async def hangs() -> None:
    await asyncio.sleep(3600)


async def misconfigured() -> None:
    raise ConfigError("policy.path = nowhere")


def supervised(start: Callable[[str], Any], **more: Any) -> SupervisedActor:
    return SupervisedActor("actor", start, **{"start_timeout_s": 5.0} | more)


def pool(start: Callable[[str], Any], least: int = 1, most: int | None = None, **more: Any) -> Pool:
    settings = {"start_timeout_s": 5.0, "attempts": 2} | more
    return Pool("test", least, most, start, **settings)


def work(what: str, seconds: float = 0.0) -> Callable[[Any], Any]:
    return lambda worker: worker.ask(Worker.work, what, seconds)


async def until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage_ray.actors.supervised.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("stage_ray.actors.supervised.LONGEST_PAUSE_S", 0.04)


def test_a_call_whose_caller_is_gone_keeps_its_turn_until_the_worker_is_done():
    async def scenario() -> None:
        starts = Starts()
        actor = supervised(starts)
        batch = asyncio.create_task(actor.call(work("batch", 0.5), 5.0))
        await asyncio.sleep(0.1)
        batch.cancel()
        await asyncio.gather(batch, return_exceptions=True)
        assert actor.waiting == 1
        await actor.call(work("load"), 0.2)  # of its own, once it is its turn
        assert starts.actors[0].inside.done == ["setup", "batch", "load"]
        assert actor.restarts == 0 and actor.waiting == 0

    asyncio.run(scenario())


def test_a_call_that_is_cancelled_before_its_turn_is_never_asked():
    async def scenario() -> None:
        starts = Starts()
        actor = supervised(starts)
        calls = [asyncio.create_task(actor.call(work(what, 0.1), 5.0)) for what in ("first", "second", "third")]
        await asyncio.sleep(0.05)
        calls[1].cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert starts.actors[0].inside.done == ["setup", "first", "third"] and actor.waiting == 0

    asyncio.run(scenario())


def test_an_actor_lost_in_a_call_whose_caller_is_gone_has_a_successor():
    async def scenario() -> None:
        starts = Starts()
        workers = pool(starts)
        await workers.ready()
        batch = asyncio.create_task(workers.call(work("batch", 3600), 0.1))
        await asyncio.sleep(0.05)
        batch.cancel()
        await until(lambda: len(starts.actors) == 2)
        assert await workers.call(work("next"), 1.0) == "test-0-restart-1"
        await workers.close()

    asyncio.run(scenario())


async def answer_late(seconds: float, value: Any) -> Any:
    """As one that a thread brings: the loop needs several turns until the caller has it."""
    await asyncio.sleep(seconds)
    for _ in range(5):
        await asyncio.sleep(0)
    return value


@pytest.mark.parametrize("call", ["heartbeat", "batch"])
def test_a_driver_that_was_busy_itself_beyond_the_deadline_kills_no_worker(call):
    async def scenario() -> None:
        starts = Starts()
        actor = supervised(starts)
        await actor.ready(1.0)
        inside = starts.actors[0].inside
        inside.ping = lambda: answer_late(0.05, (0, "another node"))
        inside.batch = lambda: answer_late(0.05, "drawn")
        asked = actor.check(0.1) if call == "heartbeat" else actor.call(lambda worker: worker.ask(Worker.batch), 0.1)
        waiting = asyncio.create_task(asked)
        await asyncio.sleep(0.01)
        time.sleep(0.3)
        await waiting
        assert not starts.actors[0].killed.is_set()

    asyncio.run(scenario())


def test_a_worker_that_answers_no_ping_is_killed():
    async def scenario() -> None:
        starts = Starts()
        actor = supervised(starts)
        await actor.ready(1.0)
        starts.actors[0].inside.ping = hangs
        async with heartbeats([actor], 0.01, 0.05):
            with pytest.raises(WorkerDied):
                await actor.call(work("batch", 3600), None)

    asyncio.run(scenario())


def test_heartbeats_that_cannot_go_on_end_what_they_watch_and_say_why(caplog):
    async def scenario() -> None:
        actor = supervised(Starts())

        async def check(deadline_s: float) -> None:
            raise KeyError("a mistake of ours")

        actor.check = check  # type: ignore[method-assign]
        async with heartbeats([actor], 0.01, 0.05):
            await asyncio.wait({asyncio.create_task(asyncio.sleep(60))})

    began = time.monotonic()
    with pytest.raises(KeyError, match="a mistake of ours"):
        asyncio.run(scenario())
    assert time.monotonic() - began < 30
    assert "the workers get no heartbeats any more" in caplog.text


def test_room_may_take_for_ever_but_a_start_that_hangs_once_there_is_room_is_given_up():
    async def scenario() -> None:
        starts = Starts(hangs)
        workers = pool(starts, start_timeout_s=0.3)
        room = asyncio.Event()

        async def ping() -> tuple[int, str]:
            await room.wait()
            return 0, "another node"

        starts.actors[0].inside.ping = ping
        workers.refill(workers.actors[0])
        await asyncio.sleep(1.5)
        assert len(starts.actors) == 1
        room.set()
        await until(lambda: len(workers.open) == 1)
        assert len(starts.actors) == 2
        await workers.close()

    asyncio.run(scenario())


def test_an_actor_whose_starts_fail_is_tried_again_until_one_succeeds(caplog):
    async def scenario() -> None:
        starts = Starts(Worker().setup, fails, fails, fails, fails, fails)
        workers = pool(starts, least=1, most=2)
        await workers.ready()
        assert await workers.call(work("batch"), 1.0) == "test-0"
        await until(lambda: len(workers.open) == 2)
        assert [actor.restarts for actor in workers.actors] == [0, 5]
        await workers.close()

    asyncio.run(scenario())
    pauses = [record.args[1] for record in caplog.records if "in %g s" in record.msg]
    assert pauses == [0.01, 0.02, 0.04, 0.04, 0.04]


def test_a_pool_without_a_worker_whose_starts_fail_says_why():
    async def scenario() -> None:
        starts = Starts(Worker().setup, fails, fails)
        workers = pool(starts, start_timeout_s=60.0)
        await workers.ready()
        starts.actors[0].kill()
        with pytest.raises(NoWorkersLeft, match="no test worker is left and none starts: .* the GPU is not free yet"):
            await workers.call(work("batch"), 1.0, attempts=2)
        await workers.close()

    asyncio.run(scenario())


def test_a_config_that_a_successor_finds_wrong_is_told_when_no_worker_is_left_and_logged_before(caplog):
    async def scenario() -> None:
        starts = Starts(Worker().setup, misconfigured)
        workers = pool(starts, least=1, most=2)
        await workers.ready()
        await until(lambda: "policy.path = nowhere; its place stays empty" in caplog.text)
        assert await workers.call(work("batch"), 1.0) == "test-0"
        starts.beginnings = [misconfigured]
        starts.actors[0].kill()
        with pytest.raises(ConfigError, match="nowhere"):
            await workers.call(work("batch"), 1.0, attempts=2)
        await asyncio.sleep(0.1)
        assert len(starts.actors) == 3, "a successor would read the same config"
        await workers.close()

    asyncio.run(scenario())


def test_a_mistake_in_the_refilling_itself_reaches_the_log_and_the_next_caller(caplog):
    async def scenario() -> None:
        workers = pool(Starts(), least=1, most=2)

        async def ready(timeout_s: float | None) -> None:
            raise KeyError("a mistake of ours")

        workers.actors[1].ready = ready  # type: ignore[method-assign]
        await workers.ready()
        await until(lambda: "are not refilled any more" in caplog.text)
        with pytest.raises(KeyError, match="a mistake of ours"):
            await workers.call(work("batch"), 1.0)
        await workers.close()

    asyncio.run(scenario())


def test_a_worker_that_is_late_with_a_version_is_named_with_the_version_and_its_limit(caplog):
    async def scenario() -> None:
        starts = Starts()
        store = ObjectStore(None, 0.05)  # type: ignore[arg-type]  # the learner is not asked here
        workers = pool(starts, sync=store.newest)
        await workers.ready()
        late = "test-0 did not take version 7 within cluster.sync_timeout_s = 0.05 s"
        store.published = Publication(7, "manifest", ())
        starts.actors[0].inside.load_weights = lambda manifest: hangs()
        starts.beginnings = [lambda: setattr_then(starts.actors[1].inside, lambda manifest: hangs())]
        with pytest.raises(WorkerLost, match=late):
            await workers.actors[0].call(lambda worker: store.newest("test-0", worker), None)
        await until(lambda: len(starts.actors) == 3)
        await workers.close()
        assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING][:2] == [
            f"{late}; another takes its place",
            f"{late}; another takes its place in 0.01 s",
        ]

    asyncio.run(scenario())


async def setattr_then(worker: Worker, load: Any) -> None:
    worker.load_weights = load  # type: ignore[attr-defined]
