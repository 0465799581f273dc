"""The actors of a run and the calls between them. Holds references; never touches a tensor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from stage_ray.actors.pool import NoWorkersLeft, Pool
from stage_ray.actors.rank_group import end, setup
from stage_ray.actors.supervised import ArgumentsLost, SupervisedActor, WorkerDied, WorkerFailed, WorkerLost, heartbeats
from stage_ray.cluster.placement import Actors
from stage_ray.cluster.runtime import start_ray
from stage_ray.config import RunConfig
from stage_ray.errors import LearnerLostError, RunError
from stage_ray.records import RolloutReceipt, RolloutRequest, ScoreReceipt
from stage_ray.weights.object_store import ObjectStore, Transport


class GroupsLostError(Exception):
    """The payload of some groups went down with a node; the others are as they were."""

    def __init__(self, group_ids: Sequence[int]) -> None:
        super().__init__(f"groups {list(group_ids)} were lost with a node")
        self.group_ids = list(group_ids)


@dataclass(frozen=True, slots=True)
class GroupRefs:
    """Where one group's payload lies: references only."""

    group_id: int
    policy_version: int
    tokens: Any  # ObjectRef of RolloutGroup
    images: Any = None  # ObjectRef of uint8 [G, H, W, 3]; None once nobody will look at them
    scores: Any = None  # ObjectRef of ScoredGroup


class Cluster:
    """Rollout workers, reward workers and the learner, each in a seat that outlives it.

    Invariants: a rollout worker gets the newest published version before its first request (promise 6). A learner that
    took a lost one's seat is asked for nothing before `accept_learner`: whoever calls that gives it its state back.
    """

    def __init__(self, run: RunConfig, logs: Path | None) -> None:
        self.run = run
        self._logs = logs
        self._stored = run.cluster.weight_transport == "object_store"
        self._loading: list[asyncio.Task[int | None]] = []
        self._accepted_learner = 0
        actors = self._actors(logs)
        timeout, attempts = run.cluster.start_timeout_s, run.cluster.attempts

        def pool(role: str, size: Any, start: Callable[[str], Any], **more: Any) -> Pool:
            settings = {"start_timeout_s": timeout, "attempts": attempts, "setup": setup, "kill": end, **more}
            return Pool(role, size.workers, size.max_workers, start, **settings)

        # The learner first: colocated rollout workers are placed beside its ranks.
        self.learner = SupervisedActor(
            "learner", actors.learner, start_timeout_s=timeout, setup=self._setup_learner, kill=end, keep_failed=True
        )
        self.transport = self._transport()
        self.rollouts = pool("rollout", run.rollout, actors.rollout, sync=self._sync_weights)
        self.rewards = pool("reward", run.scoring, actors.reward)

    @classmethod
    @asynccontextmanager
    async def start(cls, run: RunConfig, run_dir: Path) -> AsyncIterator[Cluster]:
        """Start or join Ray, start every actor and wait until all are warm.

        Raises:
            RunError: Ray or a worker does not start; says which and where its log is.
            ConfigError: what a worker found wrong with the config (a broken model directory, say).
        """
        local = start_ray(run, run_dir)
        try:
            cluster = cls(run, run_dir / "logs" if local else None)
            pools = (cluster.rollouts, cluster.rewards)
            try:
                await cluster._setup()
            except WorkerLost as lost:
                raise cluster._fatal(lost) from lost
            try:
                async with heartbeats(cluster.seats(), run.cluster.heartbeat_s, run.cluster.heartbeat_deadline_s):
                    yield cluster
            finally:
                for pool in pools:
                    await pool.close()
        finally:
            ray.shutdown()

    async def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        turn: int | None = None,
        on_retry: Callable[[], None] = lambda: None,
    ) -> tuple[RolloutReceipt, list[GroupRefs]]:
        """Draw one wave; a worker that is lost is replaced, and the same requests go to its successor.

        Args:
            requests: with their seeds, so a second attempt draws the same images (at the then newest version).
            turn: which worker, modulo their number; None takes the one with the shortest queue.
            on_retry: called before each further attempt.
        """

        async def draw(worker: Any) -> tuple[RolloutReceipt, list[Any]]:
            receipt_ref, *refs = worker.generate.options(num_returns=1 + 2 * len(requests)).remote(*requests)
            receipt = await receipt_ref
            if receipt.problem:
                raise WorkerFailed(f"{receipt.worker} drew what cannot be used: {receipt.problem}")
            return receipt, refs

        timeout, attempts = self.run.rollout.timeout_s, self.run.cluster.attempts
        try:
            receipt, refs = await self.rollouts.call(draw, timeout, turn=turn, attempts=attempts, on_retry=on_retry)
        except WorkerLost as lost:
            raise self._fatal(lost) from lost
        pairs = zip(requests, refs[::2], refs[1::2], strict=True)
        return receipt, [GroupRefs(r.group_id, receipt.policy_version, tokens, images) for r, tokens, images in pairs]

    async def score(self, groups: Sequence[GroupRefs]) -> list[tuple[ScoreReceipt, GroupRefs]]:
        """Score a batch of groups; where a worker is too slow or fails, its groups come back as not ok.

        One that dies says nothing about them: they go to others, up to ``cluster.attempts`` times in all.

        Raises:
            GroupsLostError: some of them are gone, with the node that held them; none is scored.
            RunError: no worker is left.
        """
        objects = [ref for group in groups for ref in (group.tokens, group.images)]

        async def judge(worker: Any) -> tuple[Sequence[ScoreReceipt], list[Any]]:
            receipts_ref, *scored = worker.score.options(num_returns=1 + len(groups)).remote(*objects)
            return await receipts_ref, scored

        timeout, attempts = self.run.scoring.timeout_s, self.run.cluster.attempts
        try:
            receipts, scored = await self.rewards.call(judge, timeout, attempts=attempts, retry=WorkerDied)
        except NoWorkersLeft as lost:
            raise self._fatal(lost) from lost
        except WorkerLost as lost:
            return [(ScoreReceipt(group.group_id, ok=False, error=str(lost)), group) for group in groups]
        except ArgumentsLost as lost:
            raise GroupsLostError(await self.missing(groups)) from lost
        results = zip(receipts, groups, scored, strict=True)
        return [(r, GroupRefs(g.group_id, g.policy_version, g.tokens, g.images, s)) for r, g, s in results]

    async def set_batch(self, groups: Sequence[GroupRefs]) -> None:
        """Give the learner the groups of its next update.

        Raises:
            GroupsLostError: some of them are gone, with the node that held them; the learner got none.
        """
        objects = [ref for group in groups for ref in (group.tokens, group.scores)]
        try:
            await self.call_learner(lambda worker: worker.set_batch.remote(*objects))
        except ArgumentsLost as lost:
            raise GroupsLostError(await self.missing(groups)) from lost

    async def update(self) -> dict[str, float]:
        """One STAGE update with the groups in the learner's hands; the policy's version grows by one."""

        async def update(worker: Any) -> Any:
            async with self._gpus_to_itself():
                return await worker.update.remote()

        return await self.call_learner(update)

    async def publish(self) -> None:
        """Broadcast the learner's version: every wave that is asked for from now on is drawn with it.

        In a synchronous run it returns when all workers serve it; else they load it behind our back, between waves,
        and the next `publish` or `settle` says if one could not.
        """
        await (self.settle() if self._stored else self._settle())  # who has no worker left may get one by a broadcast
        await self.transport.publish(self.rollouts.seats)
        self._loading = [asyncio.create_task(self._load(seat)) for seat in self.rollouts.seats if seat.started]
        await asyncio.sleep(0)  # let each take its place in its worker's queue
        if self.run.pipeline.max_staleness == 0:
            await self.settle()

    async def settle(self) -> None:
        """Wait until every rollout worker serves what was published last.

        Raises:
            RunError: a worker and its successors could not load it in ``cluster.sync_timeout_s``.
            LearnerLostError: the learner was lost while it sent.
        """
        if not await self._settle():
            return
        try:
            await self.rollouts.wait_any()
        except WorkerLost as lost:
            raise self._fatal(lost) from lost

    async def _settle(self) -> bool:
        """The same, also while no worker is left; whether there was anything to wait for."""
        loading, self._loading = self._loading, []
        try:
            served = {version for version in await asyncio.gather(*loading) if version is not None}
        except WorkerLost as lost:
            raise self._fatal(lost) from lost
        await self.transport.settled()
        self._require_accepted()
        if served - {self.transport.version}:
            raise RunError(f"rollout workers serve versions {served} after {self.transport.version} was published")
        return bool(loading)

    async def fetch(self, refs: Sequence[Any]) -> list[Any]:
        """Bring small objects (verdicts, a few pictures for a person to look at) to the driver."""
        return list(await asyncio.gather(*refs))

    async def call_learner(self, ask: Callable[[Any], Any], *, patient: bool = False) -> Any:
        """Call the learner; ``patient``: the call sets limits of its own.

        Raises:
            LearnerLostError: it died or hung, now or in a call that nobody has looked at yet.
            RunError: it refused (a loss that is not finite, say).
        """

        def ask_accepted(worker: Any) -> Any:
            self._require_accepted()
            return ask(worker)

        try:
            return await self.learner.call(ask_accepted, None if patient else self.run.learner.timeout_s)
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
        return self.transport.version is not None

    def busy(self) -> dict[str, float]:
        """Seconds that each role's actors have worked since the last call, added up over a role."""
        roles = {"rollout": self.rollouts.seats, "reward": self.rewards.seats, "learner": [self.learner]}
        seconds = {}
        for role, seats in roles.items():
            seconds[role] = sum(seat.busy_s for seat in seats)
            for seat in seats:
                seat.busy_s = 0.0
        return seconds

    def workers(self) -> dict[str, int]:
        """Actors of each role that can be asked now."""
        return {"rollout": len(self.rollouts.open), "reward": len(self.rewards.open), "learner": 1}

    def seats(self) -> list[SupervisedActor]:
        """Every seat of the run."""
        return [*self.rollouts.seats, *self.rewards.seats, self.learner]

    def restarts(self) -> int:
        """Actors replaced so far."""
        return sum(seat.restarts for seat in self.seats())

    async def _load(self, seat: SupervisedActor) -> int | None:
        """Let one worker load the newest version; None where it is lost (its successor begins with that), or where the
        version went down with the learner's node (the next learner publishes its own).
        """
        try:
            return await self.transport.load(seat)
        except (WorkerLost, ArgumentsLost):
            return None

    async def _setup(self) -> None:
        """Wait until every actor that the run needs is warm."""
        if self.run.rollout.colocated:
            # vLLM wants its share of a GPU free when it starts, and takes what others allocate while it measures itself
            # for its own needs; if they free some it refuses. So workers load first, alone, and then sleep.
            await self.rollouts.ready()
        timeout = self.run.cluster.start_timeout_s
        await asyncio.gather(self.rollouts.ready(), self.rewards.ready(), self.learner.ready(timeout))

    @asynccontextmanager
    async def _gpus_to_itself(self) -> AsyncIterator[None]:
        """Colocated workers leave their GPUs to the learner for as long as the context lasts, and none begins.

        The next wave or version wakes them. Entered only when it is the learner's turn, so that nobody who holds the
        workers waits for the learner.
        """
        seats = self.rollouts.seats if self.run.rollout.colocated else []
        limit = self.run.cluster.sync_timeout_s
        async with AsyncExitStack() as exclusive:
            asleep = (seat.exclusive(lambda worker: worker.sleep.remote(), limit) for seat in seats)
            await asyncio.gather(*map(exclusive.enter_async_context, asleep))
            yield

    async def _setup_learner(self, worker: Any) -> None:
        async with self._gpus_to_itself():
            await setup(worker)

    async def missing(self, groups: Sequence[GroupRefs]) -> list[int]:
        """Which groups' payload is nowhere any more. Only here does the driver fetch any: to see if it can."""
        missing = []
        for group in groups:
            refs = [ref for ref in (group.tokens, group.images, group.scores) if ref is not None]
            try:
                await asyncio.gather(*refs)
            except ObjectLostError:
                missing.append(group.group_id)
        return missing

    async def _sync_weights(self, name: str, worker: Any) -> None:
        loading = self.transport.newest(name, worker)
        if loading is not None:
            await loading

    def _transport(self) -> Transport:
        backend = self.run.cluster.weight_transport
        if backend == "object_store":
            return ObjectStore(self.call_learner, self.run.cluster.sync_timeout_s)
        from stage_ray.weights.broadcast import Broadcast  # late: it brings torch into the driver

        return Broadcast(self.run.cluster, backend, self.learner, self.call_learner)

    def _require_accepted(self) -> None:
        if self.learner.restarts != self._accepted_learner:
            raise LearnerLostError(f"the learner was lost before; {self._look()}")

    def _actors(self, logs: Path | None) -> Actors:
        return Actors(self.run, logs)

    def _fatal(self, lost: WorkerLost) -> RunError:
        return RunError(f"{lost}; {self._look()}")

    def _look(self) -> str:
        return f"its log is in {self._logs}" if self._logs else "see its log in Ray's dashboard or `ray logs`"
