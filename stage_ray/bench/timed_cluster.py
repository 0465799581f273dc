"""A cluster that only waits: what the pipeline bench drives in place of Ray's actors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from stage_ray.config import RunConfig
from stage_ray.records import GroupRefs, RolloutRequest, Update


class TimedCluster:
    """What `GroupStream` and the loop ask of a `stage_ray.cluster.cluster.Cluster`, with waiting in place of work.

    As there, a worker does one thing at a time in the order in which it was asked, and loads a version between batches.
    """

    def __init__(self, run: RunConfig, stages: Sequence[float]) -> None:
        self._generate_s, self._score_s, self._update_s = stages
        self._synchronous = run.pipeline.max_staleness == 0
        self._rollouts = [asyncio.Lock() for _ in range(run.rollout.workers)]
        self._served = [0] * run.rollout.workers
        self._scorers = run.scoring.workers
        self._rewards = asyncio.Semaphore(self._scorers)
        self._version = 0
        self._loading: list[asyncio.Task[None]] = []

    async def generate(
        self, requests: Sequence[RolloutRequest], *, turn: int | None = None, on_retry: Callable[[], None] | None = None
    ) -> list[GroupRefs]:
        """Wait as long as a generation batch takes."""
        worker = (turn or 0) % len(self._rollouts)
        async with self._rollouts[worker]:
            await asyncio.sleep(self._generate_s)
            version = self._served[worker]
        seconds = self._generate_s
        return [GroupRefs(request.group_id, version, "tokens", "images", generate_s=seconds) for request in requests]

    async def score(self, groups: Sequence[GroupRefs]) -> list[GroupRefs]:
        """Wait as long as scoring a batch takes."""
        async with self._rewards:
            await asyncio.sleep(self._score_s)
        return list(groups)

    @property
    def learner(self) -> TimedCluster:
        """This object has the learner's methods too."""
        return self

    async def update(self, groups: Sequence[GroupRefs]) -> Update:
        """Wait as long as an update takes."""
        await asyncio.sleep(self._update_s)
        self._version += 1
        return Update(self._version, {})

    async def publish(self, version: int) -> None:
        """Every worker loads the version after the batches it was asked for; waits for that in a synchronous run."""
        await asyncio.gather(*self._loading)
        self._loading = [asyncio.create_task(self._load(worker)) for worker in range(len(self._rollouts))]
        await asyncio.sleep(0)
        if self._synchronous:
            await asyncio.gather(*self._loading)

    def busy(self) -> dict[str, float]:
        """Not measured."""
        return {"rollout": 0.0, "reward": 0.0, "learner": 0.0}

    def workers(self) -> dict[str, int]:
        """All of them, always."""
        return {"rollout": len(self._rollouts), "reward": self._scorers, "learner": 1}

    def restarts(self) -> int:
        """No worker dies."""
        return 0

    async def _load(self, worker: int) -> None:
        version = self._version
        async with self._rollouts[worker]:
            self._served[worker] = version
