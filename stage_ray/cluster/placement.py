"""How each role's actor is made: what it reserves, where it may run, its threads and its environment."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stage_ray.actors.client import Client
from stage_ray.config import LearnerConfig, RolloutConfig, RunConfig
from stage_ray.engines.vllm.environment import vllm_environment
from stage_ray.observability.logs import worker_environment
from stage_ray.workers.learner import LearnerClient, LearnerWorker
from stage_ray.workers.reward import RewardClient, RewardWorker
from stage_ray.workers.rollout import RolloutClient, RolloutWorker

C = TypeVar("C", bound=Client)


class Actors:
    """Starts the workers of a run, without waiting for them.

    Example:
        worker = Actors(run, Path("runs/a/logs")).rollout("rollout-0")
    """

    def __init__(self, run: RunConfig, logs: Path | None) -> None:
        """``logs``: directory of the workers' logs; None leaves them to Ray, on the node where each runs."""
        self._run, self._logs = run, logs
        self._learners: PlacementGroup | None = None  # beside whose ranks colocated rollout workers live

    def rollout(self, name: str) -> RolloutClient:
        """A rollout worker: one actor, or tensor-parallel ranks on one node; colocated ones after the learner."""
        rollout = self._run.rollout
        env = vllm_environment(rollout) if rollout.engine == "vllm" else {}
        env |= self._threads(rollout.threads, rollout.tensor_parallel)
        start = partial(self._actor, RolloutWorker, rollout, env)
        if self._learners is not None:
            number = int(name.split("-")[1])
            return RolloutClient(start(name, 0, **_in_bundle(self._learners, number)))
        group = None
        if rollout.tensor_parallel > 1:
            group = placement_group([_bundle(rollout)] * rollout.tensor_parallel, strategy="STRICT_PACK")
        return self._ranks(RolloutClient, name, rollout.tensor_parallel, start, group)

    def reward(self, name: str) -> RewardClient:
        """A reward worker."""
        scoring = self._run.scoring
        make = actor_of(RewardWorker, scoring.cpus, scoring.gpus, {"OMP_NUM_THREADS": "1"}, scoring.resources)
        return RewardClient(make.remote(name, list(self._run.rewards), self._log(name)))

    def learner(self, name: str) -> LearnerClient:
        """The learner: one actor, or ranks as close together as there is room, each with room for a colocated worker.

        Ray places all of them or none (a placement group).
        """
        learner, rollout = self._run.learner, self._run.rollout
        start = partial(self._actor, LearnerWorker, learner, self._threads(learner.threads, learner.ranks))
        group = None
        if learner.ranks > 1 or rollout.colocated:
            bundle = _bundle(learner, rollout) if rollout.colocated else _bundle(learner)
            group = placement_group([bundle] * learner.ranks, strategy="PACK")
        self._learners = group if rollout.colocated else None
        return self._ranks(LearnerClient, name, learner.ranks, start, group)

    def _ranks(
        self, client: type[C], name: str, count: int, start: Callable[..., Any], group: PlacementGroup | None
    ) -> C:
        """A worker of ``count`` actors, each in its bundle of the group where there is one."""
        names = [f"{name}-rank-{rank}" for rank in range(count)] if count > 1 else [name]
        places = [_in_bundle(group, rank) if group else {} for rank in range(count)]
        actors = [start(names[rank], rank, **places[rank]) for rank in range(count)]
        return client(*actors, name=name, placement=group)

    def _actor(
        self,
        role: type,
        share: RolloutConfig | LearnerConfig,
        env: Mapping[str, str],
        name: str,
        rank: int,
        **where: Any,
    ) -> Any:
        make = actor_of(role, share.cpus, share.gpus, env, share.resources, **where)
        return make.remote(name, self._run, self._log(name), rank)

    def _log(self, name: str) -> str | None:
        return str((self._logs / f"{name}.log").resolve()) if self._logs else None

    def _threads(self, count: int | None, share: int = 1) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(count or max(1, default_threads(self._run.pipeline.max_staleness) // share))}


def _bundle(*shares: RolloutConfig | LearnerConfig) -> dict[str, float]:
    """What one place reserves for the actors that share it."""
    bundle: Counter[str] = Counter()
    for share in shares:
        bundle.update({"CPU": share.cpus, "GPU": share.gpus, **share.resources})
    return {key: n for key, n in bundle.items() if n}


def _in_bundle(group: PlacementGroup, number: int) -> dict[str, Any]:
    """Options of an actor that lives in a bundle of a placement group, and ends with it."""
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, number)}


def default_threads(max_staleness: int) -> int:
    """Threads of rollout worker and learner: every core where they take turns, half of them where both work at once."""
    cores = os.cpu_count() or 1
    return cores if max_staleness == 0 else max(1, cores // 2)


def actor_of(
    role: type,
    cpus: float,
    gpus: float,
    env: Mapping[str, str],
    resources: Mapping[str, float] | None = None,
    **where: Any,
) -> Any:
    """The actor class of a role (a `Worker`), with what it reserves, its environment and Ray's options that place it.

    Its ``.remote(...)`` starts one.
    """
    # Ray shows a process without a GPU of its own every GPU of the node, and a process that sees one takes it.
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    # Pings are answered by a thread of their own, also while the actor works.
    pinged = ray.remote(concurrency_groups={"health": 1})(role)
    return pinged.options(
        num_cpus=cpus,
        num_gpus=gpus,
        resources=dict(resources or {}),
        runtime_env={"env_vars": {**env, **hidden, **worker_environment()}},
        **where,
    )
