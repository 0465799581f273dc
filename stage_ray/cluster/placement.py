"""How each role's actor is made: what it reserves, where it may run, its threads and its environment."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ray
from ray._private.runtime_env.py_modules import upload_py_modules_if_needed
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stage_ray.actors.client import Client, Worker
from stage_ray.config import LearnerConfig, RolloutConfig, RunConfig, RuntimeEnvConfig, ScoringConfig, ScoringPool
from stage_ray.engines.vllm.environment import vllm_environment
from stage_ray.observability.logs import worker_environment
from stage_ray.workers.learner import LearnerWorker
from stage_ray.workers.reward import RewardClient, RewardWorker
from stage_ray.workers.rollout import RolloutClient, RolloutWorker
from stage_ray.workers.threads import openmp_environment

Share = RolloutConfig | ScoringConfig | LearnerConfig  # what one rank of a role reserves
Place: TypeAlias = PlacementGroupSchedulingStrategy | None  # a bundle of a placement group; None: where Ray wants


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
        actors = self._ranks(RolloutWorker, name, rollout, env, _places(group, ranks, first))
        return RolloutClient(*actors, name=name, placement=None if self._learners else group)

    def reward(self, name: str, pool: ScoringPool) -> RewardClient:
        """A reward worker of a pool."""
        return RewardClient(*self._ranks(RewardWorker, name, pool, {}, [None], pool.columns))

    def learner(self, name: str) -> Client:
        """The learner: one actor, or ranks as close together as may be, each with room for a colocated worker."""
        learner, rollout = self._run.learner, self._run.rollout
        group = None
        if learner.ranks > 1 or rollout.colocated:
            bundle = _bundle(learner, rollout) if rollout.colocated else _bundle(learner)
            group = placement_group([bundle] * learner.ranks, strategy="PACK")  # all of them or none
        self._learners = group if rollout.colocated else None
        actors = self._ranks(LearnerWorker, name, learner, {}, _places(group, learner.ranks))
        return Client(*actors, name=name, placement=group)

    def _ranks(
        self, role: type[Worker], name: str, share: Share, env: Mapping[str, str], places: Sequence[Place], *more: Any
    ) -> list[Any]:
        """A worker's actors, one for each place; ``more``: what this role's take besides."""
        # The worker sees for itself once it is where it runs; but libraries read the variable when they are loaded.
        alone = {"OMP_NUM_THREADS": "1"}
        openmp = alone if isinstance(share, ScoringConfig) else openmp_environment(self._run, share)
        env, actors = {**env, **openmp}, []
        packages = share.runtime_env if isinstance(share, ScoringConfig) else RuntimeEnvConfig()
        for rank, place in enumerate(places):
            make = actor_of(role, share.cpus, share.gpus, env, share.resources, place, packages)
            own = f"{name}-rank-{rank}" if len(places) > 1 else name
            log = str((self._logs / f"{own}.log").resolve()) if self._logs else None
            actors.append(make.remote(own, self._run, log, rank, *more))
        return actors


def _places(group: PlacementGroup | None, count: int, first: int = 0) -> list[Place]:
    """The places of so many ranks: bundles of the group, where there is one, from the ``first`` on."""
    return [PlacementGroupSchedulingStrategy(group, first + rank) if group else None for rank in range(count)]


def _bundle(*shares: Share) -> dict[str, float]:
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
    place: Place = None,
    given: RuntimeEnvConfig | None = None,
) -> Any:
    """The actor class of a role, with what it reserves and its environment. Its ``.remote(...)`` starts one.

    ``given``: the environment of a config; of variables that this run sets too, those that keep its processes apart
    and its logs together win.
    """
    # Ray shows a process without a GPU of its own every GPU of the node, and a process that sees one takes it.
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    packages = given.model_dump(exclude_none=True) if given else {}
    # Of an actor Ray takes only what is in the cluster already.
    upload_py_modules_if_needed(packages, include_gitignore=True, scratch_dir=tempfile.gettempdir())
    variables = packages.pop("env_vars", {})
    return ray.remote(concurrency_groups=dict(role.threads))(role).options(
        num_cpus=cpus,
        num_gpus=gpus,
        resources=dict(resources or {}),
        runtime_env=packages | {"env_vars": {**env, **variables, **hidden, **worker_environment()}},
        scheduling_strategy=place,
    )
