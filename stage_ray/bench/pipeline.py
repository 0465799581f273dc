"""Pipeline: the driver's own code over stand-ins that only wait: does it hide the faster stages, and at what cost?"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage_ray.bench.base import Bench, Measurement, Row, Trials, Variant, bench_run, interleave, median
from stage_ray.config import RunConfig
from stage_ray.pipeline.ledger import Ledger
from stage_ray.pipeline.prompts import PromptCursor
from stage_ray.pipeline.stream import GroupStream
from stage_ray.records import GroupRefs, Prompt, RolloutRequest, Update

STAGES = (1.0, 0.3, 0.8)  # seconds of a generation batch, of scoring a batch, of an update
STALENESS = (1, 2)
ALLOWANCE_MS = 3.0
ROLLOUTS, REWARDS = 64, 16


class PipelineBench(Bench):
    """Step time against the slowest stage, then the driver's cost with many workers; the device plays no part."""

    def rows(self) -> list[Row]:
        """A row for each staleness bound, then one of the driver's cost."""
        stages = [seconds / 10 if self.quick else seconds for seconds in STAGES]
        steps, held, repeats = (6, 250, 3) if self.quick else (20, 1000, 9)
        timed = [
            Variant(f"k{k}", driven, {"stages": stages, "staleness": k, "steps": steps + k + 2, "groups": 8})
            for k in STALENESS
        ]
        found = interleave(timed, repeats=1, warmups=0, progress=self.progress, title="pipeline, timed stages")
        rows = [overlap_row(k, stages, found[f"k{k}"]) for k in STALENESS]
        pools = {"staleness": 1, "steps": 2, "groups": held // 2, "rollouts": ROLLOUTS, "rewards": REWARDS}
        costs = [Variant("driver", driven, {"stages": (0.0, 0.0, 0.0), **pools})]
        found = interleave(costs, repeats=repeats, progress=self.progress, title="pipeline, driver")
        return [*rows, cost_row(found["driver"], held)]


def overlap_row(staleness: int, stages: Sequence[float], trials: Sequence[Measurement]) -> Row:
    """Mean seconds of a step against the slowest stage."""
    slowest, total, times = max(stages), sum(stages), ", ".join(f"{seconds:g} s" for seconds in stages)
    return Row(
        f"pipeline/overlap/max_staleness-{staleness}",
        *(1.05, slowest, median(trials, "seconds")),
        ratio_is="step time by the slowest stage's",
        baseline_is=f"the slowest stage: {times} for a generation batch, scoring and an update",
        better="lower",
        limit=max(slowest, total / (staleness + 1)),
        limit_is=f"the slowest stage, or {staleness + 1} batches in the buffer that each take {total:g} s",
        details={"sum_of_stages_s": total},
        notes=("one rollout worker, one reward worker; a generation batch takes as long whatever its size",),
    )


def cost_row(trials: Sequence[Measurement], held: int) -> Row:
    """What the driver's own work takes of its one core for a group, with ``held`` groups in the buffer."""
    workers = f"{held} groups, {ROLLOUTS} rollout and {REWARDS} reward workers"
    return Row(
        "pipeline/driver/cost",
        *(1.0, ALLOWANCE_MS, 1e3 * median(trials, "group_s")),
        ratio_is="cost of a group by the allowance",
        baseline_is=f"an allowance of {ALLOWANCE_MS:g} ms",
        unit="ms",
        better="lower",
        limit=1e3 * median(trials, "ledger_s"),
        limit_is="the ledger's four lines a group",
        notes=(f"processor time of stream, buffer and ledger with {workers}; without what Ray's own calls cost",),
    )


def driven(
    stages: Sequence[float], staleness: int, steps: int, groups: int, rollouts: int = 1, rewards: int = 1
) -> Trials:
    """Run the driver over a `TimedCluster`; a worker's generation batch holds all ``groups`` of a step.

    Yields seconds of a step once the pipeline is full, and processor seconds of a group: in all, and of its ledger.
    """
    run = bench_run(
        steps=steps,
        rollout={"group_size": 8, "groups_per_step": groups, "images_per_batch": 8 * groups, "workers": rollouts},
        scoring={"workers": rewards, "groups_per_call": groups if rewards == 1 else 8},
        pipeline={"max_staleness": staleness},
    )
    while True:
        with tempfile.TemporaryDirectory(prefix="stage-ray-bench-") as directory:
            began = time.process_time()
            ended = asyncio.run(drive(run, stages, Ledger(Path(directory) / "ledger.jsonl")))
            group_s = (time.process_time() - began) / (run.steps * groups)
            ledger, began = Ledger(Path(directory) / "alone.jsonl"), time.process_time()
            for event in ("admitted", "generated", "scored", "trained"):
                ledger.note(event, range(10 * groups), step=0, policy_version=0)  # at once, which is the least possible
            ledger_s = (time.process_time() - began) / (10 * groups)
        full = ended[min(staleness + 1, steps - 2) :]
        yield {"seconds": (full[-1] - full[0]) / (len(full) - 1), "group_s": group_s, "ledger_s": ledger_s}


async def drive(run: RunConfig, stages: Sequence[float], ledger: Ledger) -> list[float]:
    """The loop of `stage_ray.train` without files and pictures; when each step ended."""
    cluster: Any = TimedCluster(run, stages)
    prompts = PromptCursor([Prompt(i, f"prompt {i}") for i in range(100)], run.seed)
    ended = []
    async with GroupStream(cluster, run, prompts, ledger, 0, step=0) as stream:
        for step in range(run.steps):
            groups = await stream.next_batch()
            update = await cluster.learner.update(groups)
            await cluster.publish(update.version)
            stream.mark_trained(groups, step)
            stream.metrics()
            ended.append(time.perf_counter())
            if step + 1 < run.steps:
                stream.release(groups)
    return ended


class TimedCluster:
    """What `GroupStream` and the loop ask of a `stage_ray.cluster.cluster.Cluster`, with waiting in place of work.

    As there, a worker does one thing at a time in the order in which it was asked, and loads a version between batches.
    """

    def __init__(self, run: RunConfig, stages: Sequence[float]) -> None:
        self._generate_s, self._score_s, self._update_s = stages
        self._synchronous = run.pipeline.max_staleness == 0
        self._counts = {"rollout": run.rollout.workers, "reward": run.scoring.workers, "learner": 1}
        self._rollouts = [asyncio.Lock() for _ in range(run.rollout.workers)]
        self._served = [0] * run.rollout.workers
        self._rewards = asyncio.Semaphore(run.scoring.workers)
        self._version = 0
        self._loading: list[asyncio.Task[None]] = []
        self.learner = self  # this object has the learner's methods too

    async def generate(self, requests: Sequence[RolloutRequest], turn: int | None = None, **_: Any) -> list[GroupRefs]:
        """Wait as long as a generation batch takes."""
        worker, seconds = (turn or 0) % len(self._rollouts), self._generate_s
        async with self._rollouts[worker]:
            await asyncio.sleep(seconds)
            version = self._served[worker]
        return [GroupRefs(request.group_id, version, "tokens", "images", generate_s=seconds) for request in requests]

    async def score(self, groups: Sequence[GroupRefs]) -> list[GroupRefs]:
        """Wait as long as scoring a batch takes."""
        async with self._rewards:
            await asyncio.sleep(self._score_s)
        return list(groups)

    async def update(self, groups: Sequence[GroupRefs]) -> Update:
        """Wait as long as an update takes."""
        await asyncio.sleep(self._update_s)
        self._version += 1
        return Update(self._version, {})

    async def publish(self, version: int) -> None:
        """Every worker loads the version after the batches it was asked for; waits for that in a synchronous run."""

        async def load(worker: int) -> None:
            async with self._rollouts[worker]:
                self._served[worker] = version

        await asyncio.gather(*self._loading)
        self._loading = [asyncio.create_task(load(worker)) for worker in range(len(self._rollouts))]
        await (asyncio.gather(*self._loading) if self._synchronous else asyncio.sleep(0))

    def busy(self) -> dict[str, float]:
        """Not measured."""
        return dict.fromkeys(self._counts, 0.0)

    def workers(self) -> dict[str, int]:
        """All of them, always."""
        return self._counts

    def restarts(self) -> int:
        """No worker dies."""
        return 0
