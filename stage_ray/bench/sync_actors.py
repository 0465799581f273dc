"""A run's actors and cluster around weights alone: what the sync bench publishes through."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage_ray.actors.client import Client
from stage_ray.bench.limits import synchronize, timed
from stage_ray.cluster.cluster import Cluster
from stage_ray.cluster.placement import Actors, actor_of
from stage_ray.config import RunConfig
from stage_ray.config.hardware import usable_cpus
from stage_ray.engines.base import ImageEngine
from stage_ray.engines.sampling import SamplingParams
from stage_ray.records import WeightManifest
from stage_ray.weights.manifest import Chunk
from stage_ray.weights.process_groups import GroupMember
from stage_ray.workers.learner import LearnerWorker
from stage_ray.workers.reward import RewardClient
from stage_ray.workers.rollout import RolloutClient, RolloutWorker

CPU = torch.device("cpu")
TENSORS, WIDTH = 32, 1000
ROW = 4 * TENSORS * WIDTH  # bytes of one float32 row in every tensor


class Weights:
    """What stands in for the learner: tensors, every number of which is the version's."""

    def __init__(self, nbytes: int, device: str) -> None:
        self.version = 0
        self._tensors = tensors_of(nbytes, device)

    def advance(self) -> None:
        """The next version."""
        self.version += 1
        for tensor in self._tensors.values():
            tensor.fill_(float(self.version))

    def weights(self, *, in_place: bool = False) -> list[tuple[str, Tensor]]:
        """As `stage_ray.learner.Learner.weights`."""
        return [(name, tensor if in_place else tensor.cpu()) for name, tensor in self._tensors.items()]


class WeightsEngine(ImageEngine):
    """An engine that only takes weights: the checks of every engine, then what `TorchEngine` does with them."""

    def __init__(self, nbytes: int, device: str) -> None:
        super().__init__("bench", 1, SamplingParams())
        self.tensors = tensors_of(nbytes, device)

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Read them where they lie, or copy them to the GPU."""
        self.tensors = {name: new.to(self.tensors[name].device) for name, new in tensors.items()}
        for tensor in self.tensors.values():
            synchronize(tensor.device)

    def _unused(self, *arguments: Any) -> Any:
        raise NotImplementedError("the sync bench moves weights and does nothing else")

    sample: Any = _unused
    offload = onload = close = _unused


class SyncLearner(LearnerWorker):
    """The learner's actor, with its own packing, chunks and sending, around `Weights`."""

    def __init__(self, nbytes: int, device: str, run: RunConfig) -> None:
        self._run, self._rank = run, 0
        self._learner: Any = Weights(nbytes, device)
        self._chunks: list[Chunk] = []
        self._pack_s = 0.0

    def setup(self, address: str = "") -> None:
        """There is nothing to load."""

    def pack(self) -> WeightManifest:
        """As every learner, timed."""
        self._pack_s, manifest = timed(CPU, super().pack)
        return manifest

    def offer(self) -> WeightManifest:
        """As every learner, timed."""
        self._pack_s, manifest = timed(CPU, super().offer)
        return manifest

    def advance(self) -> int:
        """What an update does to weights; the new version."""
        self._learner.advance()
        return int(self._learner.version)

    def pack_s(self) -> float:
        """Seconds of the last `pack` or `offer`."""
        return self._pack_s


class SyncRolloutWorker(RolloutWorker):
    """The rollout worker's actor, with its own loading, around `WeightsEngine`."""

    def __init__(self, nbytes: int, device: str) -> None:
        self._engine: Any = WeightsEngine(nbytes, device)
        self._load_s = 0.0

    def setup(self, address: str = "") -> None:
        """There is nothing to load."""

    def load_weights(self, manifest: WeightManifest, *chunks: Chunk) -> int:
        """As every rollout worker, timed."""
        self._load_s, version = timed(CPU, super().load_weights, manifest, *chunks)
        return version

    def receive(self, manifest: WeightManifest, place: GroupMember) -> str:
        """As every rollout worker, timed."""
        self._load_s, problem = timed(CPU, super().receive, manifest, place)
        return problem

    def loaded(self) -> tuple[float, list[float]]:
        """Seconds of the last load, and the distinct numbers in the weights that are served."""
        tensors = self._engine.tensors.values()
        return self._load_s, sorted({float(edge) for tensor in tensors for edge in (tensor.min(), tensor.max())})


class SyncActors(Actors):
    """Actors that hold weights and do nothing else."""

    def __init__(self, run: RunConfig, nbytes: int, device: str) -> None:
        super().__init__(run, None)
        self._size = (nbytes, device)

    def rollout(self, name: str) -> RolloutClient:
        """As the run's, around `WeightsEngine`."""
        return RolloutClient(self._start(SyncRolloutWorker, *self._size))

    def reward(self, name: str) -> RewardClient:
        """Never asked."""
        return RewardClient(actor_of(SyncRolloutWorker, 1, 0.0, {}).remote(0, "cpu"))

    def learner(self, name: str) -> Client:
        """As the run's, around `Weights`."""
        return Client(self._start(SyncLearner, *self._size, self._run))

    def _start(self, role: type, nbytes: int, device: str, *more: Any) -> Any:
        whole = self._run.cluster.weight_transport == "nccl"
        gpus = (1.0 if whole else 0.3) if device == "cuda" else 0.0
        return actor_of(role, 1, gpus, {"OMP_NUM_THREADS": str(usable_cpus())}).remote(nbytes, device, *more)


class SyncCluster(Cluster):
    """A run's cluster with its own `publish`, around `SyncActors`."""

    def __init__(self, run: RunConfig, logs: Path | None, nbytes: int = 0, device: str = "cpu") -> None:
        self._size = (nbytes, device)
        super().__init__(run, logs)

    def _actors(self, logs: Path | None) -> Actors:
        return SyncActors(self.run, *self._size)

    async def setup(self) -> None:
        """Wait until learner and workers have started."""
        await asyncio.gather(self.rollouts.ready(), self.learner.actor.ready(None))

    async def advance(self) -> int:
        """Make the next version; its number."""
        return int(await self.learner.call(lambda learner: learner.ask(SyncLearner.advance)))

    async def loaded(self) -> tuple[float, list[tuple[float, list[float]]]]:
        """The learner's `SyncLearner.pack_s`, and `SyncRolloutWorker.loaded` of each worker."""
        pack_s = await self.learner.call(lambda learner: learner.ask(SyncLearner.pack_s))
        actors = self.rollouts.actors
        return pack_s, [await actor.call(lambda worker: worker.ask(SyncRolloutWorker.loaded), None) for actor in actors]


def tensors_of(nbytes: int, device: str) -> dict[str, Tensor]:
    """Float32 tensors of ``nbytes`` in all."""
    shape = (nbytes // ROW, WIDTH)
    return {f"layer.{i}.weight": torch.zeros(shape, device=device) for i in range(TENSORS)}
