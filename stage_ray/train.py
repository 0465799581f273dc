"""The main job, readable as the algorithm: groups in, STAGE update, new version out, until the steps are done."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from stage_ray.cluster import Cluster
from stage_ray.config import RunConfig
from stage_ray.errors import ConfigError, RunError
from stage_ray.exam import Exam
from stage_ray.preflight import preflight
from stage_ray.progress import Progress
from stage_ray.records import Prompt
from stage_ray.report import write_report
from stage_ray.run_dir import open_run_dir
from stage_ray.run_files import RunFiles, StepClock
from stage_ray.stream import GroupStream

__all__ = ["ConfigError", "RunError", "RunSummary", "train"]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a finished run leaves: held-out scores are strict GenEval, 0..1, None where nothing was evaluated.

    Example:
        >>> RunSummary(Path("runs/a"), 100, 0.5, 0.75, Path("runs/a/report.html")).after
        0.75
    """

    run_dir: Path
    steps: int
    before: float | None
    after: float | None
    report: Path


def train(run: RunConfig, *, resume: bool = False, progress: Progress | None = None) -> RunSummary:
    """Run the whole job.

    Raises:
        ConfigError: the config cannot be used; no run was started and nothing overwritten.
        RunError: a worker, a scorer or a disk failed; what was done so far stays, and ``resume=True`` goes on.
    """
    prompts, heldout = preflight(run)
    run_dir = open_run_dir(run, resume)
    progress = progress or Progress()
    files = RunFiles(run, run_dir, prompts, resume=resume, progress=progress)
    try:
        before, after = asyncio.run(_train(run, run_dir, files, heldout, progress))
    finally:
        files.close()
        report = write_report(run_dir)
    return RunSummary(run_dir, run.steps, before, after, report)


async def _train(
    run: RunConfig, run_dir: Path, files: RunFiles, heldout: list[Prompt], progress: Progress
) -> tuple[float | None, float | None]:
    progress.stage("starting Ray, the rollout engine, the scorers and the learner")
    async with Cluster.start(run, run_dir) as cluster:  # workers placed, warmed, all at one version
        await files.restore(cluster)
        exam = Exam(cluster, run, heldout, run_dir, progress)
        before = await exam.sit("before", files.first_step)
        stream = GroupStream(cluster, run, files.cursor, files.ledger, files.next_group, step=files.first_step)
        async with stream:  # admits, generates, scores, refills behind our back
            for step in range(files.first_step, run.steps):
                clock = StepClock()
                groups = await stream.next_batch()  # references, in ledger order, within the staleness bound
                clock.lap("wait")
                update = await cluster.update(groups)  # the STAGE update
                clock.lap("update")
                await cluster.publish()  # version step + 1, verified by every worker
                clock.lap("publish")
                stream.trained(groups, step)
                images = len(groups) * run.rollout.group_size
                files.record(step + 1, update | stream.metrics() | clock.metrics(images))
                await exam.sample(step + 1)
                await files.checkpoint(step + 1, cluster, stream)
                if step + 1 < run.steps:
                    stream.release(groups)  # only now do their slots free
        after = await exam.sit("after", run.steps)
        progress.stage("writing the trained model and the report")
        await cluster.ask_learner("export", str((run_dir / "final").resolve()))
        return before, after
