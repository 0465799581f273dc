"""A run's real actors and cluster around bare tensors, every number of which is the version's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage_ray.actors.client import Client
from stage_ray.bench.base import bench_run
from stage_ray.cluster.cluster import Cluster
from stage_ray.cluster.placement import Actors, actor_of
from stage_ray.config import RolloutConfig, RunConfig, ScoringPool
from stage_ray.engines.base import ImageEngine
from stage_ray.workers.learner import LearnerWorker
from stage_ray.workers.reward import RewardClient
from stage_ray.workers.rollout import RolloutClient, RolloutWorker

TENSORS, WIDTH = 32, 1000
ROW = 4 * TENSORS * WIDTH  # bytes of one float32 row in every tensor


def run_of(nbytes: int, transport: str) -> RunConfig:
    """A synchronous run of two rollout workers, with room for three versions in the object store."""
    store = {"object_store_mb": 200 + 3 * nbytes // 2**20, "num_cpus": 4}
    return bench_run(rollout={"workers": 2}, cluster={**store, "weight_transport": transport})


def tensors_of(nbytes: int) -> dict[str, Tensor]:
    """Float32 tensors of ``nbytes`` in all."""
    return {f"layer.{i}.weight": torch.zeros(nbytes // ROW, WIDTH) for i in range(TENSORS)}


class Weights:
    """What stands in for the learner."""

    def __init__(self, nbytes: int) -> None:
        self.version = 0
        self._tensors = tensors_of(nbytes)

    def advance(self) -> None:
        """The next version."""
        self.version += 1
        for tensor in self._tensors.values():
            tensor.fill_(float(self.version))

    def weights(self, dtype: torch.dtype | None = None) -> list[tuple[str, Tensor]]:
        """As `stage_ray.learner.Learner.weights`."""
        return list(self._tensors.items())


class WeightsEngine(ImageEngine):
    """An engine that only takes weights: the checks of every engine, then what `TorchEngine` does with them."""

    def __init__(self, nbytes: int) -> None:
        super().__init__("test", RolloutConfig())
        self.tensors: Mapping[str, Tensor] = tensors_of(nbytes)

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Read them where they lie."""
        self.tensors = tensors

    def _unused(self, *arguments: Any) -> Any:
        raise NotImplementedError("it takes weights and does nothing else")

    sample: Any = _unused
    offload = onload = close = _unused


class SyncLearner(LearnerWorker):
    """The learner's actor, with its own packing, chunks and sending, around `Weights`."""

    def __init__(self, nbytes: int, run: RunConfig) -> None:
        self._run, self._rank = run, 0
        self._learner: Any = Weights(nbytes)
        self._stream: Any = iter(())

    def setup(self, address: str = "") -> None:
        """There is nothing to load."""

    def advance(self) -> int:
        """What an update does to weights; the new version."""
        self._learner.advance()
        return int(self._learner.version)


class SyncRolloutWorker(RolloutWorker):
    """The rollout worker's actor, with its own loading, around `WeightsEngine`."""

    def __init__(self, nbytes: int) -> None:
        self._engine: Any = WeightsEngine(nbytes)

    def setup(self, address: str = "") -> None:
        """There is nothing to load."""

    def loaded(self) -> list[float]:
        """The distinct numbers in the weights that are served."""
        tensors = self._engine.tensors.values()
        return sorted({float(edge) for tensor in tensors for edge in (tensor.min(), tensor.max())})


class SyncActors(Actors):
    """Actors that hold weights and do nothing else."""

    def __init__(self, run: RunConfig, nbytes: int) -> None:
        super().__init__(run, None)
        self._size = (nbytes,)

    def rollout(self, name: str) -> RolloutClient:
        """As the run's, around `WeightsEngine`."""
        return RolloutClient(actor_of(SyncRolloutWorker, 1, 0, {}).remote(*self._size))

    def reward(self, name: str, pool: ScoringPool) -> RewardClient:
        """Never asked."""
        return RewardClient(actor_of(SyncRolloutWorker, 1, 0, {}).remote(0))

    def learner(self, name: str) -> Client:
        """As the run's, around `Weights`."""
        return Client(actor_of(SyncLearner, 1, 0, {}).remote(*self._size, self._run))


class SyncCluster(Cluster):
    """A run's cluster with its own `publish`, around `SyncActors`."""

    actors_class: type[SyncActors] = SyncActors

    def __init__(self, run: RunConfig, logs: Path | None, nbytes: int) -> None:
        super().__init__(run, logs, self.actors_class(run, nbytes))

    async def setup(self) -> None:
        """Wait until learner and workers have started."""
        await asyncio.gather(self.rollouts.ready(), self.learner.actor.ready(None))
