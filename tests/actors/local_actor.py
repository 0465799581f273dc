"""Actors in this process, to test supervision, pools and clusters with: real ones take seconds to come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from stage_ray.actors.client import Client
from stage_ray.cluster.cluster import Cluster
from stage_ray.config import RunConfig, ScoringPool
from stage_ray.config.load import validate_config
from stage_ray.workers.reward import RewardClient
from stage_ray.workers.rollout import RolloutClient


class LocalActor:
    """An object whose methods (coroutines) are asked as a Ray actor's are, and which can be killed meanwhile.

    Example:
        actor = LocalActor(Echo())
        assert await actor.say.remote("hello") == "hello"
        first, second = actor.pair.options(num_returns=2).remote()
    """

    def __init__(self, inside: Any) -> None:
        self.inside = inside
        self.killed = asyncio.Event()

    def __getattr__(self, method: str) -> _Method:
        return _Method(self, method)

    def kill(self) -> None:
        self.killed.set()


class _Method:
    def __init__(self, actor: LocalActor, name: str, count: int = 1) -> None:
        self._actor, self._name, self._count = actor, name, count

    def options(self, num_returns: int, concurrency_group: str = "") -> _Method:
        return _Method(self._actor, self._name, num_returns)

    def remote(self, *arguments: Any, **named: Any) -> Any:
        answer = asyncio.ensure_future(self._answer(arguments, named))
        if self._count == 1:
            return answer
        items = [asyncio.ensure_future(_item(answer, index)) for index in range(self._count)]
        for item in items:  # as with Ray, not all of them need be awaited
            item.add_done_callback(lambda item: item.cancelled() or item.exception())
        return items

    async def _answer(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self._name == "ping" and not hasattr(self._actor.inside, "ping"):
            return 0, "another node"
        if self._name == "weight_dtype" and not hasattr(self._actor.inside, "weight_dtype"):
            return "float32"
        objects = [await it if isinstance(it, asyncio.Future) else it for it in arguments]
        work = asyncio.ensure_future(getattr(self._actor.inside, self._name)(*objects, **named))
        death = asyncio.ensure_future(self._actor.killed.wait())
        await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
        if self._actor.killed.is_set():
            work.cancel()
            raise RayActorError(error_msg="it was killed")
        death.cancel()
        if (error := work.exception()) is not None:
            raise RayTaskError(self._name, "", error, ip="127.0.0.1")
        return work.result()


async def _item(answer: asyncio.Future[Any], index: int) -> Any:
    return (await answer)[index]


@pytest.fixture
def local_actors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Supervised `LocalActor`s, without a Ray."""
    monkeypatch.setattr(ray, "kill", LocalActor.kill)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "this node"))
    yield


class Roles:
    """Makes the actors of a cluster, and writes down what each is asked for and when it is done."""

    def __init__(self, inside: Callable[[str], Any] | None = None) -> None:
        self.inside = inside or (lambda name: Role(self, name))
        self.calls: list[str] = []
        self.actors: dict[str, LocalActor] = {}
        self.takes: dict[str, float] = {}  # seconds of a method, or of NAME METHOD

    def make(self, name: str) -> LocalActor:
        self.actors[name] = LocalActor(self.inside(name))
        return self.actors[name]

    def rollout(self, name: str) -> RolloutClient:
        return RolloutClient(self.make(name))

    def reward(self, name: str, pool: ScoringPool) -> RewardClient:
        return RewardClient(self.make(name))

    def learner(self, name: str) -> Client:
        return Client(self.make(name))


class Role:
    """Does nothing, for as long as it is to take."""

    def __init__(self, roles: Roles, name: str) -> None:
        self._roles, self._name = roles, name

    async def score(self, *objects: Any, suite: str | None = None) -> tuple[Any, ...]:
        await self._note("score")
        groups = len(objects) // 2
        return ((("", False),) * groups, *["scores"] * groups)

    async def ping(self) -> tuple[int, str]:
        await asyncio.sleep(self._roles.takes.get(f"{self._name} ping", 0.0))
        return 0, "another node"

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments: self._note(method)

    async def _note(self, method: str) -> None:
        self._roles.calls.append(f"{self._name} {method}")
        await asyncio.sleep(self._roles.takes.get(f"{self._name} {method}", self._roles.takes.get(method, 0.0)))
        self._roles.calls.append(f"{self._name} {method} done")


class LocalCluster(Cluster):
    def __init__(self, run: RunConfig, roles: Any) -> None:
        super().__init__(run, None, roles)


def run_of(**changes: Any) -> RunConfig:
    data = {
        "steps": 1,
        "prompts": {"train": "prompts.txt"},
        "policy": {"path": "model"},
        "rollout": {"engine": "torch"},
        "rewards": [{"type": "clip"}],
        "scoring": {"timeout_s": 0.2, "attempts": 2},
        "evaluation": {"enabled": False},
        "cluster": {"attempts": 3, "start_timeout_s": 5.0},
    }
    return validate_config(data | {key: {**data.get(key, {}), **value} for key, value in changes.items()})
