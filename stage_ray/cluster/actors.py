"""How each role's actor is made: what it reserves, where it may run, its threads and its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from stage_ray.cluster.team import Team
from stage_ray.config import RunConfig
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
        """A rollout worker."""
        rollout = self._run.rollout
        env = vllm_environment(rollout) if rollout.engine == "vllm" else {}
        make = actor_of(
            RolloutWorker, rollout.cpus, rollout.gpus, env | self._threads(rollout.threads), rollout.resources
        )
        return make.remote(name, self._run.policy, rollout, self._log(name))

    def reward(self, name: str) -> Any:
        """A reward worker."""
        scoring = self._run.scoring
        make = actor_of(RewardWorker, scoring.cpus, scoring.gpus, {"OMP_NUM_THREADS": "1"}, scoring.resources)
        return make.remote(list(self._run.rewards), self._log(name))

    def learner(self, name: str) -> Any:
        """The learner: one actor, or a `Team` of ranks."""
        learner, ranks = self._run.learner, self._run.learner.ranks
        env = self._threads(learner.threads, ranks)
        if ranks == 1:
            make = actor_of(LearnerWorker, learner.cpus, learner.gpus, env, learner.resources)
            return make.remote(self._run, self._log(name))
        bundle = {"CPU": learner.cpus, **({"GPU": learner.gpus} if learner.gpus else {}), **learner.resources}

        def start(rank: int, where: Mapping[str, Any]) -> Any:
            make = actor_of(LearnerWorker, learner.cpus, learner.gpus, env, learner.resources, **where)
            return make.remote(self._run, self._log(f"{name}-rank-{rank}"), rank)

        return Team(ranks, bundle, start)

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
