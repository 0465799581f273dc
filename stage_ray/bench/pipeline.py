"""Pipeline: the driver's own code over stand-ins that only wait: does it hide the faster stages, and at what cost?"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage_ray.bench.rows import Row, median
from stage_ray.bench.timed_cluster import TimedCluster
from stage_ray.bench.timing import Facts, Trial, Variant, compare
from stage_ray.config import RunConfig
from stage_ray.config.load import validate_config
from stage_ray.observability.progress import Progress
from stage_ray.pipeline.ledger import Event, Ledger
from stage_ray.pipeline.prompts import PromptCursor
from stage_ray.pipeline.stream import GroupStream
from stage_ray.records import Prompt

STAGES = (1.0, 0.3, 0.8)  # seconds of a wave, of scoring a batch, of an update
STALENESS = (1, 2)
OVERLAP, ALLOWANCE_S, FLAT = 1.05, 0.003, 1.25
WORKERS = {"rollout": 64, "reward": 16}
FEW, MANY = 200, 1000


def bench(*, device: str, quick: bool, progress: Progress) -> list[Row]:
    """Step time against the slowest stage, then the driver's cost with many workers; the device plays no part."""
    stages = [seconds / 10 if quick else seconds for seconds in STAGES]
    steps = 6 if quick else 20
    sides = [Variant(f"k{k}", step_side, {"stages": stages, "staleness": k, "steps": steps}) for k in STALENESS]
    facts = compare(sides, repeats=1, progress=progress, title="pipeline, timed stages", warmups=0)
    rows = [overlap_row(k, stages, facts[f"k{k}"]) for k in STALENESS]
    cost = Variant("driver", cost_side, {"scale": 4 if quick else 1})
    costs = compare([cost], repeats=3 if quick else 9, progress=progress, title="pipeline, driver")["driver"]
    return rows + cost_rows(costs, quick)


def overlap_row(staleness: int, stages: Sequence[float], facts: Sequence[Facts]) -> Row:
    """Mean seconds of a step against the slowest stage."""
    slowest, seconds = max(stages), median(facts, "seconds")
    return Row(
        name=f"pipeline/overlap/max_staleness-{staleness}",
        ratio=seconds / slowest,
        target=OVERLAP,
        better="lower",
        ratio_is="step time by the slowest stage's",
        baseline_is="the slowest stage: "
        + ", ".join(f"{s:g} s" for s in stages)
        + " for a wave, scoring and an update",
        baseline=slowest,
        ours=seconds,
        limit=max(slowest, sum(stages) / (staleness + 1)),
        limit_is=f"the slowest stage, or {staleness + 1} batches in the buffer that each take {sum(stages):g} s",
        details={"sum_of_stages_s": sum(stages)},
        notes=("one rollout worker, one reward worker; a wave takes as long whatever its size",),
    )


def cost_rows(facts: Sequence[Facts], quick: bool) -> list[Row]:
    """What the driver's own work takes of its one core, and whether that grows."""
    cases = {name: median(facts, name) for name in ("few", "many", "few_slots", "many_slots")}
    few, many = (number // 4 if quick else number for number in (FEW, MANY))
    workers = f"{WORKERS['rollout']} rollout and {WORKERS['reward']} reward workers"
    common: dict[str, Any] = {
        "unit": "ms",
        "better": "lower",
        "limit": 1e3 * median(facts, "ledger"),
        "limit_is": "the ledger's four lines a group",
        "notes": (f"processor time of stream, buffer and ledger with {workers}; without what Ray's own calls cost",),
    }
    worst = max(cases.values())

    def flat(name: str, what: str, before: float, after: float) -> Row:
        return Row(
            name=f"pipeline/driver/{name}",
            ratio=after / before,
            target=FLAT,
            ratio_is=f"cost of a group with {many} by that with {few} groups {what}",
            baseline_is=f"{few} groups {what}",
            baseline=1e3 * before,
            ours=1e3 * after,
            **common,
        )

    return [
        Row(
            name="pipeline/driver/cost",
            ratio=worst / ALLOWANCE_S,
            target=1.0,
            ratio_is="cost of a group by the allowance, the worst case of those below",
            baseline_is="an allowance of 3 ms a group",
            baseline=1e3 * ALLOWANCE_S,
            ours=1e3 * worst,
            **common,
        ),
        flat("flat-over-run", "in a run", cases["few"], cases["many"]),
        flat("flat-over-slots", "held at once", cases["few_slots"], cases["many_slots"]),
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
    """A run of ``steps`` updates of ``groups`` groups; a worker's wave holds a whole batch."""
    data = {
        "steps": steps,
        "prompts": {"train": "none"},
        "policy": {"path": "none"},
        "rollout": {"group_size": 8, "groups_per_step": groups, "images_per_batch": 8 * groups, "workers": rollouts},
        "rewards": [{"type": "geneval"}],
        "scoring": {"workers": rewards, "groups_per_call": groups if rewards == 1 else 8},
        "pipeline": {"max_staleness": staleness},
        "evaluation": {"enabled": False},
    }
    return validate_config(data)


def step_side(stages: Sequence[float], staleness: int, steps: int) -> Trial:
    """Mean seconds of a step once the pipeline is full."""
    filling = staleness + 2
    run = run_of(steps=steps + filling, groups=8, staleness=staleness)

    def turn() -> Facts:
        with tempfile.TemporaryDirectory(prefix="stage-ray-bench-") as directory:
            ended = asyncio.run(drive(run, stages, Ledger(Path(directory) / "ledger.jsonl")))
        return {"seconds": (ended[-1] - ended[filling - 1]) / steps}

    return turn


def cost_side(scale: int) -> Trial:
    """Processor seconds of the driver for one group, in four cases, and of the ledger alone."""
    few, many = FEW // scale, MANY // scale
    many_steps = many // (few // 2)
    pool = {"rollouts": WORKERS["rollout"], "rewards": WORKERS["reward"], "staleness": 1}
    cases = {
        "few": run_of(steps=2, groups=few // 2, **pool),
        "many": run_of(steps=many_steps, groups=few // 2, **pool),
        "few_slots": run_of(steps=4, groups=few // 2, **pool),
        "many_slots": run_of(steps=4, groups=many // 2, **pool),
    }

    def turn() -> Facts:
        with tempfile.TemporaryDirectory(prefix="stage-ray-bench-") as directory:
            costs = {name: driver_cost(run, Path(directory) / f"{name}.jsonl") for name, run in cases.items()}
            return {**costs, "ledger": ledger_cost(many, Path(directory) / "ledger.jsonl")}

    return turn


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
