"""Pipeline: the driver's own code over stand-ins that only wait: does it hide the faster stages, and at what cost?"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage_ray.bench.base import Bench, Row, bench_run, median
from stage_ray.bench.timed_cluster import TimedCluster
from stage_ray.bench.timing import Measurement, Trial, Variant
from stage_ray.config import RunConfig
from stage_ray.pipeline.ledger import Event, Ledger
from stage_ray.pipeline.prompts import PromptCursor
from stage_ray.pipeline.stream import GroupStream
from stage_ray.records import Prompt

STAGES = (1.0, 0.3, 0.8)  # seconds of a generation batch, of scoring a batch, of an update
STALENESS = (1, 2)
OVERLAP, ALLOWANCE_MS, FLAT = 1.05, 3.0, 1.25
FEW, MANY = 200, 1000
ROLLOUTS, REWARDS = 64, 16


class PipelineBench(Bench):
    """Step time against the slowest stage, then the driver's cost with many workers; the device plays no part."""

    def rows(self) -> list[Row]:
        """A row for each staleness bound, then three of the driver's cost."""
        stages = [seconds / 10 if self.quick else seconds for seconds in STAGES]
        steps, scale, repeats = (6, 4, 3) if self.quick else (20, 1, 9)
        variants = [Variant(f"k{k}", step_time, {"stages": stages, "staleness": k, "steps": steps}) for k in STALENESS]
        steps_s = self.interleave("pipeline, timed stages", variants, repeats=1, warmups=0)
        sizes = {"few": FEW // scale, "many": MANY // scale}
        costs = self.interleave("pipeline, driver", [Variant("driver", driver_costs, sizes)], repeats=repeats)
        return [overlap_row(k, stages, steps_s[f"k{k}"]) for k in STALENESS] + cost_rows(costs["driver"], **sizes)


def overlap_row(staleness: int, stages: Sequence[float], trials: Sequence[Measurement]) -> Row:
    """Mean seconds of a step against the slowest stage."""
    slowest, total, times = max(stages), sum(stages), ", ".join(f"{seconds:g} s" for seconds in stages)
    return Row(
        name=f"pipeline/overlap/max_staleness-{staleness}",
        target=OVERLAP,
        baseline=slowest,
        ours=median(trials, "seconds"),
        better="lower",
        ratio_is="step time by the slowest stage's",
        baseline_is=f"the slowest stage: {times} for a generation batch, scoring and an update",
        limit=max(slowest, total / (staleness + 1)),
        limit_is=f"the slowest stage, or {staleness + 1} batches in the buffer that each take {total:g} s",
        details={"sum_of_stages_s": total},
        notes=("one rollout worker, one reward worker; a generation batch takes as long whatever its size",),
    )


def cost_rows(trials: Sequence[Measurement], few: int, many: int) -> list[Row]:
    """What the driver's own work takes of its one core, and whether that grows."""
    cost = {name: 1e3 * median(trials, name) for name in trials[0]}
    workers = f"{ROLLOUTS} rollout and {REWARDS} reward workers"

    def row(name: str, target: float, baseline: float, ours: float, ratio_is: str, baseline_is: str) -> Row:
        return Row(
            f"pipeline/driver/{name}",
            target,
            baseline,
            ours,
            ratio_is,
            baseline_is,
            unit="ms",
            better="lower",
            limit=cost["ledger"],
            limit_is="the ledger's four lines a group",
            notes=(f"processor time of stream, buffer and ledger with {workers}; without what Ray's own calls cost",),
        )

    def flat(name: str, where: str, case: str) -> Row:
        ratio_is = f"cost of a group with {many} by that with {few} groups {where}"
        return row(name, FLAT, cost[f"few{case}"], cost[f"many{case}"], ratio_is, f"{few} groups {where}")

    worst = max(value for name, value in cost.items() if name != "ledger")
    ratio_is = "cost of a group by the allowance, the worst case of those below"
    return [
        row("cost", 1.0, ALLOWANCE_MS, worst, ratio_is, f"an allowance of {ALLOWANCE_MS:g} ms a group"),
        flat("flat-over-run", "in a run", ""),
        flat("flat-over-slots", "held at once", "_slots"),
    ]


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


def run_of(*, steps: int, groups: int, staleness: int, rollouts: int = 1, rewards: int = 1) -> RunConfig:
    """A run of ``steps`` updates of ``groups`` groups; a worker's generation batch holds all of them."""
    return bench_run(
        steps=steps,
        rollout={"group_size": 8, "groups_per_step": groups, "images_per_batch": 8 * groups, "workers": rollouts},
        scoring={"workers": rewards, "groups_per_call": groups if rewards == 1 else 8},
        pipeline={"max_staleness": staleness},
    )


def step_time(stages: Sequence[float], staleness: int, steps: int) -> Trial:
    """Mean seconds of a step once the pipeline is full."""
    filling = staleness + 2
    run = run_of(steps=steps + filling, groups=8, staleness=staleness)

    def trial() -> Measurement:
        with tempfile.TemporaryDirectory(prefix="stage-ray-bench-") as directory:
            ended = asyncio.run(drive(run, stages, Ledger(Path(directory) / "ledger.jsonl")))
        return {"seconds": (ended[-1] - ended[filling - 1]) / steps}

    return trial


def driver_costs(few: int, many: int) -> Trial:
    """Processor seconds of the driver for one group, in four cases, and of the ledger alone."""
    cases = {
        "few": (2, few // 2),
        "many": (2 * many // few, few // 2),
        "few_slots": (4, few // 2),
        "many_slots": (4, many // 2),
    }
    pool = {"rollouts": ROLLOUTS, "rewards": REWARDS, "staleness": 1}
    runs = {name: run_of(steps=steps, groups=groups, **pool) for name, (steps, groups) in cases.items()}

    def trial() -> Measurement:
        with tempfile.TemporaryDirectory(prefix="stage-ray-bench-") as directory:
            costs = {name: driver_cost(run, Path(directory) / f"{name}.jsonl") for name, run in runs.items()}
            return {**costs, "ledger": ledger_cost(many, Path(directory) / "ledger.jsonl")}

    return trial


def driver_cost(run: RunConfig, path: Path) -> float:
    """Processor seconds for each group, when every stage is over at once."""
    ledger = Ledger(path)
    start = time.process_time()
    asyncio.run(drive(run, (0.0, 0.0, 0.0), ledger))
    return (time.process_time() - start) / (run.steps * run.rollout.groups_per_step)


def ledger_cost(groups: int, path: Path) -> float:
    """Processor seconds of writing a group's history, a batch at a time, as the stream does at best."""
    ledger = Ledger(path)
    events: tuple[Event, ...] = ("admitted", "generated", "scored", "trained")
    start = time.process_time()
    for event in events:
        ledger.note(event, range(groups), step=0, policy_version=0)
    return (time.process_time() - start) / groups
