"""The main job, readable as the algorithm: groups in, STAGE update, new version out, until the steps are done."""

from __future__ import annotations

import asyncio
import sys
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from stage_ray.cluster.cluster import Cluster
from stage_ray.config import RunConfig
from stage_ray.config.inputs import pin
from stage_ray.errors import GroupsLostError, LearnerLostError, RunError
from stage_ray.evaluation.suites import resolve_suites
from stage_ray.files import name_disk_errors
from stage_ray.observability.progress import Progress, progress_for
from stage_ray.pipeline.stream import NoValidRewardError
from stage_ray.run.preflight import RunPrompts, preflight
from stage_ray.run.recording import StepClock, StepRecorder
from stage_ray.run.run_dir import Resume, known_commits, open_run_dir
from stage_ray.run.state import RunState
from stage_ray.run.stop import StopSignal
from stage_ray.run.suites import SuiteEvaluations


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a finished run leaves: its first suite's headline before and after, if any, and the step of ``best/``."""

    run_dir: Path
    steps: int
    before: float | None
    after: float | None
    report: Path
    best: int | None = None


def train(run: RunConfig, *, resume: Resume = False, progress: Progress | None = None) -> RunSummary:
    """Run the whole job.

    Raises:
        ConfigError: the config cannot be used; no run was started and nothing overwritten.
        RunError: a worker, a scorer or a disk failed; what was done so far stays, and ``resume`` goes on.

    Example:
        train(load_config("stage_shapeworld", ["steps=20"], run_dir="runs/short")).report
    """
    run, commits = pin(resolve_suites(run), known_commits(Path(run.run_dir)) if resume else {})
    prompts = preflight(run)
    progress = progress or Progress()
    with (
        name_disk_errors(Path(run.run_dir)),
        open_run_dir(run, resume, commits, progress.note) as run_dir,
        closing(RunState(run, run_dir, prompts.train, resume=bool(resume), note=progress.note)) as state,
    ):
        recorder = StepRecorder(run, run_dir, run.steps, progress, resume_step=state.step)
        try:
            before, after = asyncio.run(_train(run, run_dir, state, recorder, prompts, progress))
        except NoValidRewardError as error:
            recorder.alarm(error.step, "no_valid_reward", str(error))
            raise
        finally:
            recorder.close()
            report = _report(run_dir, progress)  # also of a run that failed
    return RunSummary(run_dir, run.steps, before, after, report, state.best)


def _report(run_dir: Path, progress: Progress) -> Path:
    """Write the report. One that fails is no failure of the run, and hides none."""
    try:
        from stage_ray.report.report import write_report  # late: Matplotlib, which no run waits for at its start

        return write_report(run_dir)
    except (OSError, RunError, ValueError, KeyError, TypeError) as error:
        progress.note(f"the report was not written ({error}); stage-ray report {run_dir} tries again")
        return run_dir / "report.html"


async def _train(
    run: RunConfig, run_dir: Path, state: RunState, recorder: StepRecorder, prompts: RunPrompts, progress: Progress
) -> tuple[float | None, float | None]:
    progress.stage("starting Ray, the rollout engine, the scorers and the learner")
    fitted = prompts.reserve(run)
    async with StopSignal(progress) as stop, Cluster.start(fitted, run_dir) as cluster:  # warm, all at one version
        asyncio.get_running_loop().run_in_executor(None, import_module, "stage_ray.report.report")  # needed at the end
        suites = SuiteEvaluations(cluster, run, prompts, run_dir, progress, recorder.image)
        while True:
            try:
                await state.restore(cluster)
                before = await suites.before(state.step)
                state.rate(suites.scores())
                if state.step < run.steps:
                    with stop.steps():
                        await _steps(run, cluster, state, recorder, suites, stop)
                after = await suites.after()
                state.rate(suites.scores())
                progress.stage("writing the trained model and the report")
                await cluster.learner.export(run_dir / "final")
                await state.export_best(cluster, run_dir / "best")
                suites.record_best(state.best)
                return before, after
            except LearnerLostError as lost:  # all that it learned since the last checkpoint; the workers stay
                state.rewind(lost)
                recorder.rewind(state.step)
                recorder.alarm(state.step, "learner_lost", str(lost))


async def _steps(
    run: RunConfig,
    cluster: Cluster,
    state: RunState,
    recorder: StepRecorder,
    suites: SuiteEvaluations,
    stop: StopSignal,
) -> None:
    async with state.stream(cluster) as stream:  # meanwhile it admits, generates and scores the groups to come
        step, clock = state.step, StepClock()
        while step < run.steps:
            groups = await stream.next_batch()  # references, in ledger order, within the staleness bound
            clock.lap("wait")
            try:
                update = await cluster.learner.update(groups)  # the STAGE update
            except GroupsLostError as lost:  # some went down with a node, so the learner took none of the batch
                stream.requeue(groups, lost)  # those are generated again, from the same prompts and seeds
                continue
            clock.lap("update")
            await cluster.publish(update.version)  # loaded by every worker between generation batches
            clock.lap("publish")
            stream.mark_trained(groups, step)
            step += 1
            images = len(groups) * run.rollout.group_size
            metrics = update.metrics | stream.metrics() | clock.metrics(images)
            found = await stop.unless_requested(suites.during(step, metrics.get("reward/mean")))
            measured, alarms = found or ({}, [])
            recorder.step(step, metrics | measured, alarms)
            state.rate(suites.scores())
            await recorder.groups(step, cluster.learner)
            await suites.own.sample(step)
            await state.checkpoint(step, cluster, stream, now=stop.requested is not None)
            if stop.requested is not None:
                raise stop.error(step)
            if step < run.steps:
                stream.release(groups)  # only now do their slots free
            clock = StepClock()
        await state.saved()
        await suites.own.drawn()
        await cluster.settle()


class _CallableModule(ModuleType):
    """``from stage_ray import train`` gives this module, whose name the function has: both can be called."""

    def __call__(self, run: RunConfig, *, resume: Resume = False, progress: Progress | None = None) -> RunSummary:
        with progress or progress_for(run) as shown:  # as the command shows it
            return train(run, resume=resume, progress=shown)


sys.modules[__name__].__class__ = _CallableModule
