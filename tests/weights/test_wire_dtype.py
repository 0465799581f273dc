"""In which dtype a version travels, where workers hold their weights in one or in several. Stand-ins without Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stage_ray.actors.client import WorkerLate
from stage_ray.cluster.transport import Broadcast, ObjectStore
from stage_ray.records import WeightManifest


class Worker:
    """Says which dtype its engine holds, and takes any version."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    async def ask(self, method: Any, *_: Any) -> Any:
        if self._dtype == "hangs":
            await asyncio.Event().wait()
        return self._dtype if method.__name__ == "weight_dtype" else None


class Learner:
    """Remembers in which dtype its versions were asked for."""

    def __init__(self) -> None:
        self.dtypes: list[str] = []

    async def call(self, ask: Any, **_: Any) -> Any:
        return await ask(self)

    async def ask(self, method: Any, *arguments: Any) -> Any:
        self.dtypes += arguments[:1]
        return 0 if method.__name__ == "pack" else WeightManifest(1, (), 0)

    @property
    def first(self) -> Learner:
        return self

    def ask_objects(self, *_: Any) -> tuple[Any, list[Any]]:
        return asyncio.sleep(0, 1), [asyncio.sleep(0)]  # a version without chunks, and its manifest


async def dtypes_of(transport: ObjectStore, learner: Learner, *workers: tuple[str, str]) -> list[str]:
    """In which dtype a version was asked for after each of some workers, by name and dtype, has joined."""
    for name, dtype in workers:
        await transport.join(name, Worker(dtype))  # type: ignore[arg-type]
        await transport.publish([])
    await transport.settled()
    return learner.dtypes


@pytest.mark.parametrize("transport", ["object_store", "gloo", "nccl"])
@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ([("a", "bfloat16"), ("b", "bfloat16")], ["bfloat16", "bfloat16"]),
        ([("a", "float32"), ("b", "float32")], ["float32", "float32"]),
        ([("a", "bfloat16"), ("b", "float32")], ["bfloat16", "float32"]),
        # A successor on other hardware counts in place of the worker that was lost.
        ([("a", "float32"), ("b", "bfloat16"), ("a", "bfloat16")], ["float32", "float32", "bfloat16"]),
    ],
)
def test_a_version_travels_in_the_dtype_of_all_engines_or_in_float32(transport, workers, expected, monkeypatch):
    async def scenario() -> None:
        learner: Any = Learner()
        made = ObjectStore(learner, 1.0) if transport == "object_store" else Broadcast(learner, 1.0, transport)
        assert await dtypes_of(made, learner, *workers) == expected

    monkeypatch.setattr(Broadcast, "_stored", True)
    monkeypatch.setattr(Broadcast, "_pass", lambda *_: asyncio.sleep(0))
    asyncio.run(scenario())


def test_a_worker_that_does_not_say_its_dtype_is_named():
    async def scenario() -> None:
        with pytest.raises(WorkerLate, match="rollout-3 did not name its dtype within cluster.sync_timeout_s = 0.01 s"):
            await ObjectStore(Learner(), 0.01).join("rollout-3", Worker("hangs"))  # type: ignore[arg-type]

    asyncio.run(scenario())
