"""The main job, readable as the algorithm: groups in, STAGE update, new version out, until the steps are done."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from stage_ray.alarms import alarms
from stage_ray.checkpoint import CheckpointStore
from stage_ray.cluster import Cluster
from stage_ray.config import RunConfig
from stage_ray.errors import RunError
from stage_ray.exam import Exam
from stage_ray.ledger import Ledger
from stage_ray.metrics import Recorder
from stage_ray.progress import Progress
from stage_ray.prompts import PromptCursor, load_prompts
from stage_ray.report import write_report
from stage_ray.run_dir import open_run_dir
from stage_ray.stream import GroupStream


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a finished run leaves: held-out scores are strict GenEval, 0..1, None where nothing was evaluated."""

    run_dir: Path
    steps: int
    before: float | None
    after: float | None
    report: Path


def train(run: RunConfig, *, resume: bool = False, progress: Progress | None = None) -> RunSummary:
    """Run the whole job.

    Raises:
        ConfigError: the config cannot be used (nothing was started or overwritten).
        RunError: a worker, scorer or disk failed; what was done so far stays, and ``resume=True`` goes on.
    """
    prompts = load_prompts(run.prompts.train)
    heldout = load_prompts(run.prompts.heldout) if run.prompts.heldout else prompts
    run_dir = open_run_dir(run, resume)
    return asyncio.run(_train(run, run_dir, prompts, heldout, resume, progress or Progress()))


async def _train(run: RunConfig, run_dir: Path, prompts: list, heldout: list, resume: bool, progress: Progress) -> RunSummary:
    store = CheckpointStore(run_dir / "checkpoints", run.checkpoint.keep)
    saved = store.latest() if resume else None
    facts: dict[str, Any] = saved.facts if saved else {"ledger_bytes": 0, "cursor": 0, "next_group": 0}
    first = saved.step if saved else 0
    ledger = Ledger(run_dir / "ledger.jsonl", keep_bytes=facts["ledger_bytes"])
    cursor = PromptCursor(prompts, run.seed, run.prompts.shuffle, position=facts["cursor"])
    recorder = Recorder(run_dir, run.cluster.metrics_port, run.cluster.metrics_host, resume_step=first)
    progress.stage("starting Ray, the rollout engine, the scorers and the learner")
    try:
        async with Cluster.start(run, run_dir) as cluster:
            exam = Exam(cluster, run, heldout, run_dir, progress)
            if saved:
                await cluster.ask_learner("load_state", str(saved.path.resolve()))
                await cluster.publish()
                progress.note(f"resumed after step {first}")
            before = await exam.sit("before", policy_version=first)
            stream = GroupStream(cluster, run, cursor, ledger, facts["next_group"], step=first)
            async with stream:
                for step in range(first, run.steps):
                    start = time.perf_counter()
                    groups = await stream.next_batch()
                    got = time.perf_counter()
                    update = await cluster.update(groups)
                    updated = time.perf_counter()
                    await cluster.publish()
                    stream.trained(groups, step)
                    done = time.perf_counter()
                    times = {"time/wait_s": got - start, "time/update_s": updated - got, "time/publish_s": done - updated}
                    images = len(groups) * run.rollout.group_size
                    metrics = {**update, **stream.metrics(), **times, "images_per_s": images / (done - start), "time/step_s": done - start}
                    found = alarms(metrics, run)
                    recorder.step(step + 1, {**metrics, "alarms": [name for name, _ in found]})
                    progress.step(step + 1, run.steps, metrics)
                    for name, text in found:
                        progress.alarm(name, text)
                        recorder.alarm(step + 1, name, text)
                    _check_mismatch(run, metrics)
                    await exam.sample(step + 1)
                    if (step + 1) % run.checkpoint.every == 0 or step + 1 == run.steps:
                        facts = {"ledger_bytes": ledger.position(), "cursor": cursor.position, "next_group": stream.next_group}
                        await asyncio.to_thread(store.save, step + 1, lambda path: ray.get(cluster.learner.save_state.remote(str(path.resolve()))), facts)
                    if step + 1 < run.steps:
                        stream.release(groups)
            after = await exam.sit("after", policy_version=run.steps)
            await cluster.ask_learner("export", str((run_dir / "final").resolve()))
    finally:
        ledger.close()
        recorder.close()
        report = write_report(run_dir)
    return RunSummary(run_dir, run.steps, before, after, report)


def _check_mismatch(run: RunConfig, metrics: dict[str, float]) -> None:
    bound, seen = run.learner.max_mismatch, metrics["mismatch/abs_logprob"]
    if bound is not None and run.pipeline.max_staleness == 0 and seen > bound:
        raise RunError(f"rollout and learner disagree: mean |delta log p| is {seen:.3g}, above learner.max_mismatch = {bound:g}")
