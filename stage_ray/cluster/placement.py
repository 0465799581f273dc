"""How each role's actor is made: what it reserves, where it may run, its threads and its environment."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from stage_ray.actors.rank_group import RankGroup
from stage_ray.config import LearnerConfig, RolloutConfig, RunConfig
from stage_ray.engines.vllm.environment import vllm_environment
from stage_ray.observability.logs import worker_environment
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
        self._learners: RankGroup | None = None  # beside whose ranks colocated rollout workers live

    def rollout(self, name: str) -> Any:
        """A rollout worker: one actor, or a `RankGroup` of tensor-parallel ranks; colocated ones after the learner."""
        rollout = self._run.rollout
        env = vllm_environment(rollout) if rollout.engine == "vllm" else {}
        env |= self._threads(rollout.threads, rollout.tensor_parallel)
        if self._learners is not None:
            number = int(name.split("-")[1])
            return self._actor(RolloutWorker, name, rollout, env, 0, self._learners.place(number))
        return self._ranked(RolloutWorker, name, rollout, rollout.tensor_parallel, env, one_node=True)

    def reward(self, name: str) -> Any:
        """A reward worker."""
        scoring = self._run.scoring
        make = actor_of(RewardWorker, scoring.cpus, scoring.gpus, {"OMP_NUM_THREADS": "1"}, scoring.resources)
        return make.remote(name, list(self._run.rewards), self._log(name))

    def learner(self, name: str) -> Any:
        """The learner: one actor, or a `RankGroup` of ranks."""
        learner, rollout = self._run.learner, self._run.rollout
        beside = rollout if rollout.colocated else None
        env = self._threads(learner.threads, learner.ranks)
        made = self._ranked(LearnerWorker, name, learner, learner.ranks, env, beside=beside)
        self._learners = made if rollout.colocated else None
        return made

    def _ranked(
        self,
        role: type,
        name: str,
        share: RolloutConfig | LearnerConfig,
        count: int,
        env: Mapping[str, str],
        *,
        one_node: bool = False,
        beside: RolloutConfig | None = None,
    ) -> Any:
        """``count`` actors with a ``share`` of cpus, gpus and resources each.

        ``beside`` is what another actor needs that is to share each one's place.
        """

        def start(rank: int, where: Mapping[str, Any]) -> Any:
            return self._actor(role, f"{name}-rank-{rank}" if count > 1 else name, share, env, rank, where)

        if count == 1 and beside is None:
            return start(0, {})
        bundle: Counter[str] = Counter()
        for part in (share, beside) if beside else (share,):
            bundle.update({"CPU": part.cpus, "GPU": part.gpus, **part.resources})
        return RankGroup(name, count, {key: n for key, n in bundle.items() if n}, start, one_node=one_node)

    def _actor(
        self,
        role: type,
        name: str,
        share: RolloutConfig | LearnerConfig,
        env: Mapping[str, str],
        rank: int,
        where: Mapping[str, Any],
    ) -> Any:
        make = actor_of(role, share.cpus, share.gpus, env, share.resources, **where)
        return make.remote(name, self._run, self._log(name), rank)

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
    # Ray shows a process without a GPU of its own every GPU of the node, and whoever sees one takes it.
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
