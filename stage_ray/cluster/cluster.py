"""The workers of a run, with a learner or without, and the calls to them. Holds references; never touches a tensor."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import ray

from stage_ray.actors.client import WorkerLost
from stage_ray.actors.supervised import Pool, SupervisedActor, Sync, heartbeats
from stage_ray.cluster.learner import ClusterLearner
from stage_ray.cluster.placement import Actors
from stage_ray.cluster.runtime import start_ray
from stage_ray.cluster.scorers import ScorerPools
from stage_ray.cluster.transport import Broadcast, ObjectStore
from stage_ray.config import RunConfig
from stage_ray.errors import RunError
from stage_ray.records import GroupRefs, RolloutRequest
from stage_ray.workers.rollout import Drawn, RolloutClient, RolloutWorker


class InferenceCluster:
    """Rollout workers and reward workers, each supervised; the model is the config's, as it is stored."""

    publishes = False

    def __init__(
        self,
        run: RunConfig,
        logs: Path | None,
        start: Actors | None = None,
        *,
        scoring: bool = True,
        sync: Sync[RolloutClient] | None = None,
    ) -> None:
        """Start every actor without waiting for any; without ``scoring`` there are no reward workers to `score` with.

        ``start``: in place of the run's own; ``sync``: of rollout workers, as `SupervisedActor` has it.
        """
        self.run, self._hint = run, _where(logs)
        start = start or Actors(run, logs)
        limits: dict[str, Any] = {"start_timeout_s": run.cluster.start_timeout_s, "attempts": run.cluster.attempts}
        workers, more = run.rollout.workers, run.rollout.max_workers
        self.rollouts = Pool("rollout", workers, more, start.rollout, sync=sync, **limits)
        self.rewards = ScorerPools(run, start.reward if scoring else None, limits)
        self._roles: dict[str, Sequence[SupervisedActor[Any]]] = {
            "rollout": self.rollouts.actors,
            "reward": self.rewards.actors,
        }

    @classmethod
    @asynccontextmanager
    async def start(cls, run: RunConfig, run_dir: Path, *, scoring: bool = True) -> AsyncIterator[Self]:
        """Start or join Ray, start every actor and wait until all are warm; logs are in ``run_dir``.

        Raises:
            RunError: Ray or a worker does not start; says which and where its log is.
            ConfigError: what a worker found wrong with the config.
        """
        local = start_ray(run, run_dir, weights=cls.publishes)
        try:
            cluster = cls(run, run_dir / "logs" if local else None, scoring=scoring)
            with cluster._fatal():
                await cluster._setup()
            try:
                async with heartbeats(cluster.actors(), run.cluster.heartbeat_s, run.cluster.heartbeat_deadline_s):
                    yield cluster
            finally:
                await cluster.rollouts.close()
                await cluster.rewards.close()
        finally:
            ray.shutdown()

    async def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        turn: int | None = None,
        on_retry: Callable[[], None] = lambda: None,
    ) -> list[GroupRefs]:
        """Sample and decode one generation batch; a lost worker's requests go to another, and as they hold their seeds
        they draw the same images (at the then newest version). ``turn`` and ``on_retry``: as `Pool.call`.

        Where roles work at once, a worker decodes beside its next batch. Where they take turns it decodes in its own,
        with the threads that sampled: a second team of as many slows both down, and a colocated worker sleeps next.

        A group whose records are not finite in the last attempt either comes with that ``error``.

        Raises:
            RunError: the last attempt failed too, or no worker is left.
        """
        timeout, attempts = self.run.rollout.timeout_s, self.run.cluster.attempts
        tries = itertools.count(1)
        beside = self.run.pipeline.max_staleness > 0

        async def draw(worker: RolloutClient) -> Drawn:
            drawn = await worker.generate(requests, last=next(tries) >= attempts, beside=beside)
            if not beside:
                await drawn.decoded
            return drawn

        with self._fatal():
            drawn = await self.rollouts.call(
                draw, timeout, rest=lambda drawn: drawn.decoded, turn=turn, attempts=attempts, on_retry=on_retry
            )
        return drawn.groups

    async def show(self, tokens: np.ndarray, shown: float) -> np.ndarray:
        """As `stage_ray.evaluation.loop.Backend.show`, by any rollout worker; raises as `generate`."""
        run = self.run
        with self._fatal():
            return await self.rollouts.call(
                lambda worker: worker.first.ask(RolloutWorker.show, tokens, shown),
                run.rollout.timeout_s,
                attempts=run.cluster.attempts,
            )

    async def score(self, groups: Sequence[GroupRefs], suite: str | None = None) -> list[GroupRefs]:
        """As `ScorerPools.score`; a RunError where no worker is left."""
        with self._fatal():
            return await self.rewards.score(groups, suite)

    async def fetch(self, refs: Sequence[Any]) -> list[Any]:
        """Bring small objects (scores, a few pictures for a person to look at) to the driver."""
        return list(await asyncio.gather(*refs))

    def busy(self) -> dict[str, float]:
        """Seconds that each role's workers have worked since the last call, added up over a role."""
        seconds = {role: sum(actor.busy_s for actor in actors) for role, actors in self._roles.items()}
        for actor in self.actors():
            actor.busy_s = 0.0
        return seconds

    def workers(self) -> dict[str, int]:
        """Workers of each role that can be asked now."""
        return {role: sum(actor.is_ready for actor in actors) for role, actors in self._roles.items()}

    def actors(self) -> list[SupervisedActor[Any]]:
        """Every supervised actor of the run."""
        return [actor for actors in self._roles.values() for actor in actors]

    def restarts(self) -> int:
        """Workers replaced so far."""
        return sum(actor.restarts for actor in self.actors())

    async def _setup(self) -> None:
        await asyncio.gather(self.rollouts.ready(), self.rewards.ready())

    @contextmanager
    def _fatal(self) -> Iterator[None]:
        """Turn a loss that ends the run into a RunError that says where to look."""
        try:
            yield
        except WorkerLost as lost:
            raise RunError(f"{lost}; {self._hint}") from lost


class Cluster(InferenceCluster):
    """The workers of a training run, with its learner.

    Invariant: a rollout worker gets the newest published version before its first request (promise 6).
    """

    publishes = True

    def __init__(self, run: RunConfig, logs: Path | None, start: Actors | None = None, *, scoring: bool = True) -> None:
        start = start or Actors(run, logs)
        backend, timeout_s = run.cluster.weight_transport, run.cluster.sync_timeout_s
        # The learner first: colocated rollout workers are placed beside its ranks.
        self.learner = ClusterLearner(run, start.learner, self._without_rollouts, _where(logs))
        if backend == "object_store":
            self.transport = ObjectStore(self.learner, timeout_s)
        else:
            self.transport = Broadcast(self.learner, timeout_s, backend)
        super().__init__(run, logs, start, scoring=scoring, sync=self.transport.join)
        self._roles["learner"] = [self.learner.actor]

    async def publish(self, version: int) -> None:
        """Bring the learner's version to the rollout workers, which draw every batch that is asked for later with it.

        In a synchronous run it returns when all workers serve it; else they load it between batches while the run goes
        on, and the next `publish` or `settle` says if one could not.
        """
        # With the object store a pool without workers is waited for; with a broadcast this very version may revive it.
        await self.settle(wait_any=not isinstance(self.transport, Broadcast))
        await self.transport.publish(self.rollouts.actors)
        assert self.transport.version == version, f"the learner is at version {self.transport.version}, not {version}"
        await asyncio.sleep(0)  # let each load take its place in its worker's queue
        if self.run.pipeline.max_staleness == 0:
            await self.settle()

    async def settle(self, *, wait_any: bool = True) -> None:
        """Wait until every rollout worker serves what was published last and, if ``wait_any``, until there is one.

        Raises:
            RunError: no worker and none of its successors could load it in ``cluster.sync_timeout_s``.
            LearnerLostError: the learner was lost while it sent.
        """
        loaded = await self.transport.settled()
        self.learner.require_accepted()
        if loaded and wait_any:
            with self._fatal():
                await self.rollouts.wait_any()

    @property
    def published(self) -> bool:
        """Whether any version was published: before, workers hold the weights of the config's model."""
        return self.transport.version is not None

    async def _setup(self) -> None:
        if self.run.rollout.colocated:
            # vLLM wants its share of a GPU free when it starts, and takes what others allocate while it measures itself
            # for its own needs; if they free some it refuses. So workers load first, alone, and then sleep.
            await self.rollouts.ready()
        learner = self.learner.actor.ready(self.run.cluster.start_timeout_s)
        await asyncio.gather(super()._setup(), learner)

    @asynccontextmanager
    async def _without_rollouts(self) -> AsyncIterator[None]:
        """Colocated workers leave their GPUs to the learner, and none is set up; the next batch or version wakes them.

        Entered only when it is the learner's turn, so that no caller that holds the workers waits for the learner.
        """
        actors = self.rollouts.actors if self.run.rollout.colocated else []
        async with AsyncExitStack() as held:

            async def hold(actor: SupervisedActor[Any]) -> None:
                await held.enter_async_context(actor.lock)
                if actor.started:
                    with suppress(WorkerLost):  # a successor waits as well
                        await actor.ask(lambda worker: worker.ask(RolloutWorker.sleep), self.run.cluster.sync_timeout_s)

            await asyncio.gather(*map(hold, actors))
            yield


def _where(logs: Path | None) -> str:
    return f"its log is in {logs}" if logs else "see its log in Ray's dashboard or `ray logs`"
