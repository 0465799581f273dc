"""How each role's actor is made: what it reserves, where it may run, its threads and its environment."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stage_ray.actors.client import Client, Worker
from stage_ray.config import LearnerConfig, RolloutConfig, RunConfig
from stage_ray.engines.vllm.environment import vllm_environment
from stage_ray.observability.logs import worker_environment
from stage_ray.workers.learner import LearnerWorker
from stage_ray.workers.reward import RewardClient, RewardWorker
from stage_ray.workers.rollout import RolloutClient, RolloutWorker


class Actors:
    """Starts the workers of a run, without waiting for them."""

    def __init__(self, run: RunConfig, logs: Path | None) -> None:
        """``logs``: directory of the workers' logs; None leaves them to Ray, on the node where each runs."""
        self._run, self._logs = run, logs
        self._learners: PlacementGroup | None = None  # beside whose ranks colocated rollout workers live

    def rollout(self, name: str) -> RolloutClient:
        """A rollout worker: one actor, or tensor-parallel ranks on one node; colocated ones after the learner."""
        rollout = self._run.rollout
        env = vllm_environment(rollout) if rollout.engine == "vllm" else {}
        ranks, group, first = rollout.tensor_parallel, self._learners, 0
        if group is not None:
            first = int(name.split("-")[1])  # beside the learner's rank of the same number
        elif ranks > 1:
            group = placement_group([_bundle(rollout)] * ranks, strategy="STRICT_PACK")
        actors = self._ranks(RolloutWorker, name, rollout, ranks, env, group, first)
        return RolloutClient(*actors, name=name, placement=None if self._learners else group)

    def reward(self, name: str) -> RewardClient:
        """A reward worker."""
        scoring = self._run.scoring
        make = actor_of(RewardWorker, scoring.cpus, scoring.gpus, {"OMP_NUM_THREADS": "1"}, scoring.resources)
        return RewardClient(make.remote(name, list(self._run.rewards), self._log(name)))

    def learner(self, name: str) -> Client:
        """The learner: one actor, or ranks as close together as there is room, each with room for a colocated worker.

        Ray places all of them or none (a placement group).
        """
        learner, rollout = self._run.learner, self._run.rollout
        group = None
        if learner.ranks > 1 or rollout.colocated:
            bundle = _bundle(learner, rollout) if rollout.colocated else _bundle(learner)
            group = placement_group([bundle] * learner.ranks, strategy="PACK")
        self._learners = group if rollout.colocated else None
        actors = self._ranks(LearnerWorker, name, learner, learner.ranks, {}, group)
        return Client(*actors, name=name, placement=group)

    def _ranks(
        self,
        role: type[Worker],
        name: str,
        share: RolloutConfig | LearnerConfig,
        count: int,
        env: Mapping[str, str],
        group: PlacementGroup | None,
        first: int = 0,
    ) -> list[Any]:
        """A worker's actors, each in a bundle of the group where there is one, from the ``first`` on."""
        cores = os.cpu_count() or 1
        if self._run.pipeline.max_staleness > 0:  # rollout worker and learner work at once, and share the cores
            cores = max(1, cores // 2)
        threads = str(share.threads or max(1, cores // count))
        actors = []
        for rank in range(count):
            where = PlacementGroupSchedulingStrategy(group, first + rank) if group else None
            make = actor_of(role, share.cpus, share.gpus, {**env, "OMP_NUM_THREADS": threads}, share.resources, where)
            own = f"{name}-rank-{rank}" if count > 1 else name
            actors.append(make.remote(own, self._run, self._log(own), rank))
        return actors

    def _log(self, name: str) -> str | None:
        return str((self._logs / f"{name}.log").resolve()) if self._logs else None


def _bundle(*shares: RolloutConfig | LearnerConfig) -> dict[str, float]:
    """What one place reserves for the actors that share it."""
    bundle: Counter[str] = Counter()
    for share in shares:
        bundle.update({"CPU": share.cpus, "GPU": share.gpus, **share.resources})
    return {key: n for key, n in bundle.items() if n}


def actor_of(
    role: type[Worker],
    cpus: float,
    gpus: float,
    env: Mapping[str, str],
    resources: Mapping[str, float] | None = None,
    where: PlacementGroupSchedulingStrategy | None = None,
) -> Any:
    """The actor class of a role, with what it reserves and its environment. Its ``.remote(...)`` starts one.

    An actor that lives in a bundle of a placement group (``where``) ends with it.
    """
    # Ray shows a process without a GPU of its own every GPU of the node, and a process that sees one takes it.
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    # Pings are answered by a thread of their own, also while the actor works.
    return ray.remote(concurrency_groups={"health": 1})(role).options(
        num_cpus=cpus,
        num_gpus=gpus,
        resources=dict(resources or {}),
        runtime_env={"env_vars": {**env, **hidden, **worker_environment()}},
        scheduling_strategy=where,
    )
