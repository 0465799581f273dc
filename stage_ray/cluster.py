"""The actors of a run and the calls between them. Holds references; never touches a tensor."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray.exceptions import RayActorError, RayTaskError

from stage_ray.config import ClusterConfig, RolloutConfig, RunConfig
from stage_ray.engines.vllm.environment import vllm_environment
from stage_ray.errors import ConfigError, RunError
from stage_ray.records import RolloutReceipt, RolloutRequest, ScoreReceipt
from stage_ray.workers.learner import LearnerWorker
from stage_ray.workers.reward import RewardWorker
from stage_ray.workers.rollout import RolloutWorker

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class GroupRefs:
    """Where one group's payload lies: references only."""

    group_id: int
    policy_version: int
    tokens: Any  # ObjectRef of RolloutGroup
    images: Any  # ObjectRef of uint8 [G, H, W, 3]
    scores: Any = None  # ObjectRef of ScoredGroup


class Cluster:
    """Rollout workers, reward workers and the learner, warm and all at one policy version."""

    def __init__(self, run: RunConfig, logs: Path | None) -> None:
        self.run = run
        self._logs = logs
        self._rollouts = [self._start_rollout(i) for i in range(run.rollout.workers)]
        self._idle_rollouts: asyncio.Queue[Any] = asyncio.Queue()
        self._idle_rewards: asyncio.Queue[Any] = asyncio.Queue()
        self._rewards_started = 0
        self._rewards = [self._start_reward() for _ in range(run.scoring.workers)]
        options = {"num_cpus": run.learner.cpus, "num_gpus": run.learner.gpus}
        env = {"env_vars": _threads(run.learner.threads)}
        self.learner = (
            ray.remote(LearnerWorker).options(name=None, runtime_env=env, **options).remote(run, self._log("learner"))
        )

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
            await cluster._wait_until_warm()
            yield cluster
        finally:
            ray.shutdown()

    @property
    def idle_rollouts(self) -> int:
        """Rollout workers that wait for a wave."""
        return self._idle_rollouts.qsize()

    async def generate(self, requests: Sequence[RolloutRequest]) -> tuple[RolloutReceipt, list[GroupRefs]]:
        """Run one wave on the next idle rollout worker."""
        worker = await self._idle_rollouts.get()
        try:
            receipt_ref, *refs = worker.generate.options(num_returns=1 + 2 * len(requests)).remote(*requests)
            receipt = await self._call(receipt_ref, "rollout worker", self.run.rollout.timeout_s)
        finally:
            self._idle_rollouts.put_nowait(worker)
        pairs = zip(requests, refs[::2], refs[1::2], strict=True)
        return receipt, [GroupRefs(r.group_id, receipt.policy_version, tokens, images) for r, tokens, images in pairs]

    async def score(self, groups: Sequence[GroupRefs]) -> list[tuple[ScoreReceipt, GroupRefs]]:
        """Score a batch of groups on the next idle reward worker.

        A worker that times out or dies is replaced, and its groups come back as not ok.
        """
        worker = await self._idle_rewards.get()
        objects = [ref for group in groups for ref in (group.tokens, group.images)]
        try:
            receipts_ref, *scored = worker.score.options(num_returns=1 + len(groups)).remote(*objects)
            receipts = await asyncio.wait_for(_value(receipts_ref), self.run.scoring.timeout_s)
        except (TimeoutError, RayActorError) as error:
            late = isinstance(error, TimeoutError)
            why = (
                f"no answer within {self.run.scoring.timeout_s:g} s"
                if late
                else f"a reward worker died ({_first_line(error)})"
            )
            ray.kill(worker)
            worker = self._start_reward()
            return [(ScoreReceipt(group.group_id, ok=False, error=why), group) for group in groups]
        finally:
            self._idle_rewards.put_nowait(worker)
        results = zip(receipts, groups, scored, strict=True)
        return [(r, GroupRefs(g.group_id, g.policy_version, g.tokens, g.images, s)) for r, g, s in results]

    async def update(self, groups: Sequence[GroupRefs]) -> dict[str, float]:
        """One STAGE update; the policy's version grows by one."""
        objects = [ref for group in groups for ref in (group.tokens, group.scores)]
        return await self._call(self.learner.update.remote(*objects), "learner")

    async def publish(self) -> int:
        """Broadcast the learner's version to every rollout worker; returns when all serve it."""
        manifest = await self._call(self.learner.pack.remote(), "learner")
        refs = self.learner.chunks.options(num_returns=manifest.chunks).remote()
        chunks = refs if isinstance(refs, list) else [refs]
        manifest_ref = ray.put(manifest)
        calls = [worker.load_weights.remote(manifest_ref, *chunks) for worker in self._rollouts]
        served = await asyncio.gather(*(self._call(call, f"rollout-{i}") for i, call in enumerate(calls)))
        if set(served) != {manifest.version}:
            raise RunError(f"rollout workers serve versions {served} after version {manifest.version} was published")
        return manifest.version

    async def fetch(self, refs: Sequence[Any]) -> list[Any]:
        """Bring small objects (verdicts, a few pictures for a person to look at) to the driver."""
        return list(await asyncio.gather(*(self._call(ref, "a worker") for ref in refs)))

    async def ask_learner(self, method: str, *arguments: Any) -> Any:
        """Call one of the learner's other methods: save_state, load_state, export."""
        return await self._call(getattr(self.learner, method).remote(*arguments), "learner")

    async def _wait_until_warm(self) -> None:
        timeout_s = self.run.cluster.start_timeout_s
        workers = {f"rollout-{i}": w for i, w in enumerate(self._rollouts)} | {"learner": self.learner}
        workers |= {f"reward-{i}": w for i, w in enumerate(self._rewards)}
        await asyncio.gather(*(self._call(w.__ray_ready__.remote(), n, timeout_s) for n, w in workers.items()))
        for worker in self._rollouts:
            self._idle_rollouts.put_nowait(worker)
        for worker in self._rewards:
            self._idle_rewards.put_nowait(worker)

    async def _call(self, ref: Awaitable[Result], who: str, timeout_s: float | None = None) -> Result:
        """Await a worker's answer; what went wrong there becomes one sentence here."""
        try:
            return await asyncio.wait_for(_value(ref), timeout_s)
        except TimeoutError as error:
            raise RunError(f"{who} gave no answer within {timeout_s:g} s; {self._look()}") from error
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ConfigError):
                raise ConfigError(str(cause)) from error
            raise RunError(f"{who} failed: {type(cause).__name__}: {_first_line(cause)}; {self._look()}") from error
        except RayActorError as error:
            cause = error.__cause__ or getattr(error, "cause", None) or error
            text = str(error)
            if "ConfigError" in text:
                raise ConfigError(_last_line(text).split("ConfigError: ")[-1]) from error
            raise RunError(f"{who} died: {_last_line(str(cause))}; {self._look()}") from error

    def _look(self) -> str:
        return f"its log is in {self._logs}" if self._logs else "see its log in Ray's dashboard or `ray logs`"

    def _log(self, name: str) -> str | None:
        return str((self._logs / f"{name}.log").resolve()) if self._logs else None

    def _start_rollout(self, index: int) -> Any:
        rollout = self.run.rollout
        env = {"env_vars": _engine_environment(rollout) | _threads(rollout.threads)}
        options = {"num_cpus": rollout.cpus, "num_gpus": rollout.gpus, "runtime_env": env}
        name = f"rollout-{index}"
        return ray.remote(RolloutWorker).options(**options).remote(name, self.run.policy, rollout, self._log(name))

    def _start_reward(self) -> Any:
        scoring = self.run.scoring
        options = {"num_cpus": scoring.cpus, "num_gpus": scoring.gpus, "runtime_env": {"env_vars": _threads(1)}}
        name = f"reward-{self._rewards_started}"
        self._rewards_started += 1
        return ray.remote(RewardWorker).options(**options).remote(list(self.run.rewards), self._log(name))


def start_ray(run: RunConfig, run_dir: Path) -> bool:
    """Join the cluster this process belongs to, or the one named, else start one on this machine; True if started.

    Raises:
        RunError: no cluster at that address, or too little memory for the object store.
    """
    cluster = run.cluster
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
    address = cluster.address or ("auto" if "RAY_ADDRESS" in os.environ else None)
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise RunError(f"no Ray cluster answers at cluster.address = {address!r}: {_first_line(error)}") from error
        return False
    _check_memory(cluster)
    try:
        context = ray.init(
            address="local",
            num_cpus=cluster.num_cpus or max(os.cpu_count() or 1, math.ceil(wanted_cpus(run))),
            object_store_memory=cluster.object_store_mb * 2**20,
            include_dashboard=cluster.dashboard,
            dashboard_host="127.0.0.1",
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level="ERROR",
        )
    except Exception as error:  # Ray raises a bare Exception when a node does not come up in time
        raise RunError(f"Ray did not start on this machine: {_first_line(error)}") from error
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    link = logs / "ray"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(context.address_info["session_dir"]) / "logs")
    return True


def wanted_cpus(run: RunConfig) -> float:
    """Logical CPUs that all roles ask for together."""
    return run.rollout.workers * run.rollout.cpus + run.scoring.workers * run.scoring.cpus + run.learner.cpus


def _check_memory(cluster: ClusterConfig) -> None:
    free_mb = psutil.virtual_memory().available // 2**20
    if cluster.object_store_mb > free_mb:
        raise RunError(
            f"cluster.object_store_mb = {cluster.object_store_mb} is more than the {free_mb} MB of memory "
            "that are free; lower it"
        )


def _threads(count: int | None) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(count or os.cpu_count() or 1)}


def _engine_environment(rollout: RolloutConfig) -> dict[str, str]:
    return vllm_environment(rollout) if rollout.engine == "vllm" else {}


async def _value(ref: Awaitable[Result]) -> Result:
    return await ref


def _first_line(error: BaseException | None) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _last_line(text: str) -> str:
    return next(iter(reversed(text.strip().splitlines())), "")
