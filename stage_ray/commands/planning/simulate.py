"""The driver's own stream and buffer over stages that only wait, as `bench pipeline` runs them, on a clock that jumps.

Nothing else is simulated: what is admitted, when, and in what order is what a run does.
"""

from __future__ import annotations

import asyncio
import selectors
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stage_ray.bench.timed_cluster import TimedCluster
from stage_ray.config import RunConfig
from stage_ray.pipeline.ledger import Ledger
from stage_ray.pipeline.prompts import PromptCursor
from stage_ray.pipeline.stream import GroupStream
from stage_ray.records import Prompt

FILLING, STEPS = 4, 8  # steps until the pipeline is full, and those that are counted


class JumpingClock(asyncio.SelectorEventLoop):
    """An event loop whose time is that of the next timer, at once; nothing in it may wait for the outside.

    Example:
        >>> loop = JumpingClock()
        >>> loop.run_until_complete(asyncio.sleep(3600)); loop.time()
        3600.0
        >>> loop.close()
    """

    def __init__(self) -> None:
        super().__init__(_Jumping(self))
        self.now = 0.0
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Seconds since the loop was made, all of them skipped."""
        return self.now


class _Jumping(selectors.DefaultSelector):
    def __init__(self, loop: JumpingClock) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("the simulated pipeline waits for something that never comes")
        self._loop.now += max(0.0, timeout)
        found: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        return found


class PlannedCluster(TimedCluster):
    """A `TimedCluster` in which a version takes time: the learner packs, the network carries, each worker loads.

    A worker that is drawing loads after that wave, and the version travels meanwhile.
    """

    def __init__(self, run: RunConfig, stages: Mapping[str, float]) -> None:
        super().__init__(run, (stages["wave"], stages["score"], stages["update"]))
        self._pack_s, self._transfer_s, self._load_s = (stages[name] for name in ("pack", "transfer", "load"))

    async def publish(self, version: int) -> None:
        """Pack, then send behind the driver's back."""
        await asyncio.sleep(self._pack_s)
        await super().publish(version)

    async def settle(self) -> None:
        """Until every worker serves the newest version."""
        await asyncio.gather(*self._loading)

    async def _load(self, worker: int) -> None:
        version, loop = self._version, asyncio.get_running_loop()
        there = loop.time() + self._transfer_s
        async with self._rollouts[worker]:
            await asyncio.sleep(max(0.0, there - loop.time()) + self._load_s)
            self._served[worker] = version


def simulated_step_s(run: RunConfig, stages: Mapping[str, float]) -> float:
    """Mean seconds of a step once the pipeline is full.

    Args:
        run: a config; its workers, waves, staleness and order count.
        stages: seconds of ``wave`` (one wave), ``score`` (one call), ``update``, ``pack``, ``transfer`` and ``load``.

    Example:
        simulated_step_s(run, {"wave": 1.0, "score": 0.3, "update": 0.8, "pack": 0.0, "transfer": 0.0, "load": 0.0})
    """
    steps = FILLING + run.pipeline.max_staleness + STEPS
    run = run.model_copy(update={"steps": steps})
    loop = JumpingClock()
    try:
        with tempfile.TemporaryDirectory(prefix="stage-ray-plan-") as directory:
            ended = loop.run_until_complete(_drive(run, stages, Path(directory) / "ledger.jsonl"))
    finally:
        loop.close()
    return (ended[-1] - ended[-1 - STEPS]) / STEPS


async def _drive(run: RunConfig, stages: Mapping[str, float], path: Path) -> list[float]:
    """The loop of `stage_ray.train`; when each step ended."""
    cluster: Any = PlannedCluster(run, stages)
    prompts = PromptCursor([Prompt(i, f"prompt {i}") for i in range(100)], run.seed)
    ended = []
    async with GroupStream(cluster, run, prompts, Ledger(path), 0, step=0) as stream:
        for step in range(run.steps):
            groups = await stream.next_batch()
            update = await cluster.learner.update(groups)
            await cluster.publish(update.version)
            stream.mark_trained(groups, step)
            ended.append(asyncio.get_running_loop().time())
            if step + 1 < run.steps:
                stream.release(groups)
    await cluster.settle()
    return ended
