"""The main job, readable as the algorithm: groups in, STAGE update, new version out, until the steps are done."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from stage_ray.cluster.cluster import Cluster, LearnerLostError
from stage_ray.config import RunConfig
from stage_ray.errors import ConfigError, RunError
from stage_ray.files import name_disk_errors
from stage_ray.observability.progress import Progress
from stage_ray.pipeline.stream import NoValidRewardError
from stage_ray.records import Prompt
from stage_ray.report.report import write_report
from stage_ray.run.heldout import HeldOutEvaluation
from stage_ray.run.preflight import preflight
from stage_ray.run.run_dir import Resume, open_run_dir
from stage_ray.run.state import RunState, StepClock
from stage_ray.run.stop import StopSignal

__all__ = ["ConfigError", "RunError", "RunSummary", "train"]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a finished run leaves: the headline of its benchmark before and after, None where nothing was evaluated.

    Example:
        >>> RunSummary(Path("runs/a"), 100, 0.5, 0.75, Path("runs/a/report.html")).after
        0.75
    """

    run_dir: Path
    steps: int
    before: float | None
    after: float | None
    report: Path


def train(run: RunConfig, *, resume: Resume = False, progress: Progress | None = None) -> RunSummary:
    """Run the whole job.

    Raises:
        ConfigError: the config cannot be used; no run was started and nothing overwritten.
        RunError: a worker, a scorer or a disk failed; what was done so far stays, and ``resume`` goes on.
    """
    prompts, heldout_prompts = preflight(run)
    with name_disk_errors(Path(run.run_dir)), open_run_dir(run, resume) as run_dir:
        progress = progress or Progress()
        files = RunState(run, run_dir, prompts, resume=bool(resume), progress=progress)
        try:
            before, after = asyncio.run(_train(run, run_dir, files, heldout_prompts, progress))
        except NoValidRewardError as error:
            files.alarm(error.step, "no_valid_reward", str(error))
            raise
        finally:
            files.close()
            report = write_report(run_dir)
    return RunSummary(run_dir, run.steps, before, after, report)


async def _train(
    run: RunConfig, run_dir: Path, files: RunState, heldout_prompts: list[Prompt], progress: Progress
) -> tuple[float | None, float | None]:
    progress.stage("starting Ray, the rollout engine, the scorers and the learner")
    async with StopSignal(progress) as stop, Cluster.start(run, run_dir) as cluster:  # warm, all at one version
        heldout = HeldOutEvaluation(cluster, run, heldout_prompts, run_dir, progress)
        final = str((run_dir / "final").resolve())
        while True:
            try:
                await files.restore(cluster)
                before = await heldout.evaluate("before", files.step)
                if files.step < run.steps:
                    with stop.steps():
                        await _steps(run, cluster, files, heldout, stop)
                after = await heldout.evaluate("after", run.steps)
                progress.stage("writing the trained model and the report")
                await cluster.call_learner(lambda learner: learner.export.remote(final))
                return before, after
            except LearnerLostError as lost:  # its work since the last checkpoint is gone; everyone else stays
                await files.rewind(lost)
                files.alarm(files.step, "learner_lost", str(lost))


async def _steps(
    run: RunConfig, cluster: Cluster, files: RunState, heldout: HeldOutEvaluation, stop: StopSignal
) -> None:
    async with files.stream(cluster) as stream:  # admits, generates, scores, refills behind our back
        for step in range(files.step, run.steps):
            clock = StepClock()
            groups = await stream.next_batch()  # references, within the staleness bound, in the learner's hands
            clock.lap("wait")
            update = await cluster.update()  # the STAGE update
            clock.lap("update")
            await cluster.publish()  # version step + 1, loaded by every worker between waves
            clock.lap("publish")
            stream.mark_trained(groups, step)
            images = len(groups) * run.rollout.group_size
            files.record(step + 1, update | stream.metrics() | clock.metrics(images))
            await files.keep_groups(step + 1, cluster)
            await heldout.sample(step + 1)
            await files.checkpoint(step + 1, cluster, stream, now=stop.requested is not None)
            if stop.requested is not None:
                raise stop.error(step + 1)
            if step + 1 < run.steps:
                stream.free_slots(groups)  # only now do their slots free
        await files.saved()
        await heldout.drawn()
        await cluster.settle()
