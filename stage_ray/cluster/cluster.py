"""The actors of a run and the calls between them. Holds references; never touches a tensor."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from stage_ray.cluster.local_ray import start_ray
from stage_ray.cluster.seats import Seat, WorkerFailed, WorkerLost, heartbeats
from stage_ray.config import RolloutConfig, RunConfig
from stage_ray.engines.vllm.environment import vllm_environment
from stage_ray.errors import RunError
from stage_ray.records import RolloutReceipt, RolloutRequest, ScoreReceipt
from stage_ray.workers.learner import LearnerWorker
from stage_ray.workers.reward import RewardWorker
from stage_ray.workers.rollout import RolloutWorker


class LearnerLostError(RunError):
    """The learner died or hung; another one has started in its place, and has not got the run's state yet."""


@dataclass(frozen=True, slots=True)
class GroupRefs:
    """Where one group's payload lies: references only."""

    group_id: int
    policy_version: int
    tokens: Any  # ObjectRef of RolloutGroup
    images: Any = None  # ObjectRef of uint8 [G, H, W, 3]; None once nobody will look at them
    scores: Any = None  # ObjectRef of ScoredGroup


@dataclass(frozen=True, slots=True)
class _Publication:
    """One policy version in the object store."""

    version: int
    manifest: Any
    chunks: tuple[Any, ...]


class Cluster:
    """Rollout workers, reward workers and the learner, each in a seat that outlives it.

    Invariants: a rollout worker gets the newest published version before its first request (promise 6). A learner that
    took a lost one's seat is asked for nothing before `accept_learner`: whoever calls that gives it its state back.
    """

    def __init__(self, run: RunConfig, logs: Path | None) -> None:
        self.run = run
        self._logs = logs
        self._published: _Publication | None = None
        self._loading: list[asyncio.Task[int]] = []
        self._accepted_learner = 0
        self._turn = 0
        timeout = run.cluster.start_timeout_s

        def seats(role: str, count: int, start: Callable[[str], Any], **more: Any) -> list[Seat]:
            return [Seat(f"{role}-{i}", start, start_timeout_s=timeout, **more) for i in range(count)]

        self.rollouts = seats("rollout", run.rollout.workers, self._start_rollout, prepare=self._newest_weights)
        self.rewards = seats("reward", run.scoring.workers, self._start_reward)
        self.learner = Seat("learner", self._start_learner, start_timeout_s=timeout, keep_failed=True)

    @classmethod
    @asynccontextmanager
    async def start(cls, run: RunConfig, run_dir: Path) -> AsyncIterator[Cluster]:
        """Start or join Ray, start every actor in parallel and wait until all are warm.

        Raises:
            RunError: Ray or a worker does not start; says which and where its log is.
            ConfigError: what a worker found wrong with the config (a broken model directory, say).
        """
        local = start_ray(run, run_dir)
        try:
            cluster = cls(run, run_dir / "logs" if local else None)
            seats = [*cluster.rollouts, *cluster.rewards, cluster.learner]
            try:
                await asyncio.gather(*(seat.ready() for seat in seats))
            except WorkerLost as lost:
                raise cluster._fatal(lost) from lost
            async with heartbeats(seats, run.cluster.heartbeat_s, run.cluster.heartbeat_deadline_s):
                yield cluster
        finally:
            ray.shutdown()

    async def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        seat: int | None = None,
        on_retry: Callable[[], None] = lambda: None,
    ) -> tuple[RolloutReceipt, list[GroupRefs]]:
        """Draw one wave; a worker that is lost is replaced, and the same requests go to its successor.

        Args:
            requests: with their seeds, so a second attempt draws the same images (at the then newest version).
            seat: which worker, modulo their number; None takes the one with the shortest queue.
            on_retry: called before each further attempt.
        """

        async def draw(worker: Any) -> tuple[RolloutReceipt, list[Any]]:
            receipt_ref, *refs = worker.generate.options(num_returns=1 + 2 * len(requests)).remote(*requests)
            receipt = await receipt_ref
            if receipt.problem:
                raise WorkerFailed(f"{receipt.worker} drew what cannot be used: {receipt.problem}")
            return receipt, refs

        worker = self._shortest_queue(self.rollouts) if seat is None else self.rollouts[seat % len(self.rollouts)]
        try:
            receipt, refs = await worker.call(
                draw, self.run.rollout.timeout_s, attempts=self.run.cluster.attempts, on_retry=on_retry
            )
        except WorkerLost as lost:
            raise self._fatal(lost) from lost
        pairs = zip(requests, refs[::2], refs[1::2], strict=True)
        return receipt, [GroupRefs(r.group_id, receipt.policy_version, tokens, images) for r, tokens, images in pairs]

    async def score(self, groups: Sequence[GroupRefs]) -> list[tuple[ScoreReceipt, GroupRefs]]:
        """Score a batch of groups; where a worker is lost, it is replaced and its groups come back as not ok."""
        objects = [ref for group in groups for ref in (group.tokens, group.images)]

        async def judge(worker: Any) -> tuple[Sequence[ScoreReceipt], list[Any]]:
            receipts_ref, *scored = worker.score.options(num_returns=1 + len(groups)).remote(*objects)
            return await receipts_ref, scored

        try:
            receipts, scored = await self._shortest_queue(self.rewards).call(judge, self.run.scoring.timeout_s)
        except WorkerLost as lost:
            return [(ScoreReceipt(group.group_id, ok=False, error=str(lost)), group) for group in groups]
        results = zip(receipts, groups, scored, strict=True)
        return [(r, GroupRefs(g.group_id, g.policy_version, g.tokens, g.images, s)) for r, g, s in results]

    async def update(self, groups: Sequence[GroupRefs]) -> dict[str, float]:
        """One STAGE update; the policy's version grows by one."""
        objects = [ref for group in groups for ref in (group.tokens, group.scores)]
        return await self.ask_learner(lambda worker: worker.update.remote(*objects))

    async def publish(self) -> None:
        """Broadcast the learner's version: every wave that is asked for from now on is drawn with it.

        In a synchronous run it returns when all workers serve it; else they load it behind our back, between waves,
        and the next `publish` or `settle` says if one could not.
        """
        await self.settle()

        async def pack(worker: Any) -> _Publication:
            manifest = await worker.pack.remote()
            version, *chunks = worker.chunks.options(num_returns=1 + manifest.chunks).remote()
            await version  # a learner that dies before all are stored is lost here, not in every worker that loads them
            return _Publication(manifest.version, ray.put(manifest), tuple(chunks))

        self._published = await self.ask_learner(pack)
        self._loading = [asyncio.create_task(self._load(seat)) for seat in self.rollouts]
        await asyncio.sleep(0)  # let each take its place in its worker's queue
        if self.run.pipeline.max_staleness == 0:
            await self.settle()

    async def settle(self) -> None:
        """Wait until every rollout worker serves what was published last.

        Raises:
            RunError: a worker and its successors could not load it in ``cluster.sync_timeout_s``.
        """
        loading, self._loading = self._loading, []
        if not loading:
            return
        try:
            served = await asyncio.gather(*loading)
        except WorkerLost as lost:
            raise self._fatal(lost) from lost
        if self._published is not None and set(served) != {self._published.version}:
            raise RunError(f"rollout workers serve versions {served} after {self._published.version} was published")

    async def fetch(self, refs: Sequence[Any]) -> list[Any]:
        """Bring small objects (verdicts, a few pictures for a person to look at) to the driver."""
        return list(await asyncio.gather(*refs))

    async def ask_learner(self, ask: Callable[[Any], Any]) -> Any:
        """Call the learner.

        Raises:
            LearnerLostError: it died or hung, now or in a call that nobody has looked at yet.
            RunError: it refused (a loss that is not finite, say).
        """

        def ask_accepted(worker: Any) -> Any:
            if self.learner.restarts != self._accepted_learner:
                raise LearnerLostError(f"the learner was lost before; {self._look()}")
            return ask(worker)

        try:
            return await self.learner.call(ask_accepted, self.run.learner.timeout_s)
        except WorkerFailed as failed:
            raise self._fatal(failed) from failed
        except WorkerLost as lost:
            raise LearnerLostError(f"{lost}; {self._look()}") from lost

    def accept_learner(self) -> None:
        """Take the learner that sits there now for the run's, new or not."""
        self._accepted_learner = self.learner.restarts

    @property
    def published(self) -> bool:
        """Whether any version was published: before, workers hold the weights of the config's model."""
        return self._published is not None

    def busy(self) -> dict[str, float]:
        """Seconds that each role's actors have worked since the last call, added up over a role."""
        roles = {"rollout": self.rollouts, "reward": self.rewards, "learner": [self.learner]}
        seconds = {}
        for role, seats in roles.items():
            seconds[role] = sum(seat.busy_s for seat in seats)
            for seat in seats:
                seat.busy_s = 0.0
        return seconds

    def restarts(self) -> int:
        """Actors replaced so far."""
        return sum(seat.restarts for seat in (*self.rollouts, *self.rewards, self.learner))

    def _load(self, seat: Seat) -> Any:
        def load(worker: Any) -> Any:
            newest = self._newest_weights(worker)
            assert newest is not None, "nothing was published"
            return newest

        return seat.call(load, self.run.cluster.sync_timeout_s, attempts=self.run.cluster.attempts)

    def _newest_weights(self, worker: Any) -> Any | None:
        published = self._published
        return worker.load_weights.remote(published.manifest, *published.chunks) if published else None

    def _shortest_queue(self, seats: Sequence[Seat]) -> Seat:
        """The seat with the fewest calls; among equals they take turns."""
        self._turn += 1
        order = [seats[(self._turn + i) % len(seats)] for i in range(len(seats))]
        return min(order, key=lambda seat: seat.waiting)

    def _fatal(self, lost: WorkerLost) -> RunError:
        return RunError(f"{lost}; {self._look()}")

    def _look(self) -> str:
        return f"its log is in {self._logs}" if self._logs else "see its log in Ray's dashboard or `ray logs`"

    def _log(self, name: str) -> str | None:
        return str((self._logs / f"{name}.log").resolve()) if self._logs else None

    def _start_rollout(self, name: str) -> Any:
        rollout = self.run.rollout
        env = _engine_environment(rollout) | self._threads(rollout.threads)
        arguments = (name, self.run.policy, rollout, self._log(name))
        return actor_of(RolloutWorker, rollout.cpus, rollout.gpus, env).remote(*arguments)

    def _start_reward(self, name: str) -> Any:
        scoring = self.run.scoring
        env = {"OMP_NUM_THREADS": "1"}
        return actor_of(RewardWorker, scoring.cpus, scoring.gpus, env).remote(list(self.run.rewards), self._log(name))

    def _start_learner(self, name: str) -> Any:
        learner = self.run.learner
        env = self._threads(learner.threads)
        return actor_of(LearnerWorker, learner.cpus, learner.gpus, env).remote(self.run, self._log(name))

    def _threads(self, count: int | None) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(count or default_threads(self.run.pipeline.max_staleness))}


def default_threads(max_staleness: int) -> int:
    """Threads of rollout worker and learner: every core where they take turns, half of them where both work at once."""
    cores = os.cpu_count() or 1
    return cores if max_staleness == 0 else max(1, cores // 2)


def actor_of(role: type, cpus: float, gpus: float, env: dict[str, str]) -> Any:
    """The actor class of a role (`Pinged`), with what it reserves and its environment; ``.remote(...)`` starts one."""
    # Pings are answered by a thread of their own, also while the actor works.
    pinged = ray.remote(concurrency_groups={"health": 1})(role)
    return pinged.options(num_cpus=cpus, num_gpus=gpus, runtime_env={"env_vars": env})


def _engine_environment(rollout: RolloutConfig) -> dict[str, str]:
    return vllm_environment(rollout) if rollout.engine == "vllm" else {}
