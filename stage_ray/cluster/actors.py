"""How each role's actor is made: what it reserves, where it may run, its threads and its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from stage_ray.cluster.team import Team
from stage_ray.config import LearnerConfig, RolloutConfig, RunConfig
from stage_ray.engines.vllm.environment import vllm_environment
from stage_ray.run.logs import worker_environment
from stage_ray.workers.learner import LearnerWorker
from stage_ray.workers.reward import RewardWorker
from stage_ray.workers.rollout import RolloutWorker


class Actors:
    """Starts the actors of a run.

    Example:
        worker = Actors(run, Path("runs/a/logs")).rollout("rollout-0")
    """

    def __init__(self, run: RunConfig, logs: Path | None) -> None:
        """``logs``: directory of the workers' logs; None leaves them to Ray, on the node where each runs."""
        self._run, self._logs = run, logs

    def rollout(self, name: str) -> Any:
        """A rollout worker: one actor, or a `Team` of tensor-parallel ranks."""
        rollout = self._run.rollout
        env = vllm_environment(rollout) if rollout.engine == "vllm" else {}
        env |= self._threads(rollout.threads, rollout.tensor_parallel)
        return self._ranked(RolloutWorker, name, rollout, rollout.tensor_parallel, env, one_node=True)

    def reward(self, name: str) -> Any:
        """A reward worker."""
        scoring = self._run.scoring
        make = actor_of(RewardWorker, scoring.cpus, scoring.gpus, {"OMP_NUM_THREADS": "1"}, scoring.resources)
        return make.remote(list(self._run.rewards), self._log(name))

    def learner(self, name: str) -> Any:
        """The learner: one actor, or a `Team` of ranks."""
        learner = self._run.learner
        return self._ranked(LearnerWorker, name, learner, learner.ranks, self._threads(learner.threads, learner.ranks))

    def _ranked(
        self,
        role: type,
        name: str,
        share: RolloutConfig | LearnerConfig,
        count: int,
        env: Mapping[str, str],
        *,
        one_node: bool = False,
    ) -> Any:
        """``count`` actors with a ``share`` of cpus, gpus and resources each; they load when they `begin`."""

        def start(rank: int, where: Mapping[str, Any]) -> Any:
            actor = f"{name}-rank-{rank}" if count > 1 else name
            make = actor_of(role, share.cpus, share.gpus, env, share.resources, **where)
            return make.remote(actor, self._run, self._log(actor), rank)

        if count == 1:
            return start(0, {})
        bundle = {"CPU": share.cpus, **({"GPU": share.gpus} if share.gpus else {}), **share.resources}
        return Team(name, count, bundle, start, one_node=one_node)

    def _log(self, name: str) -> str | None:
        return str((self._logs / f"{name}.log").resolve()) if self._logs else None

    def _threads(self, count: int | None, share: int = 1) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(count or max(1, default_threads(self._run.pipeline.max_staleness) // share))}


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
    """The actor class of a role (`Pinged`), with what it reserves, its environment and Ray's options that place it.

    Its ``.remote(...)`` starts one.
    """
    # Pings are answered by a thread of their own, also while the actor works.
    pinged = ray.remote(concurrency_groups={"health": 1})(role)
    return pinged.options(
        num_cpus=cpus,
        num_gpus=gpus,
        resources=dict(resources or {}),
        runtime_env={"env_vars": {**env, **worker_environment()}},
        **where,
    )
