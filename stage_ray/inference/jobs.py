"""Prompts drawn and scored apart from training: by an engine of this process, or by the workers of a cluster."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from stage_ray.config import RunConfig
from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageEngine
from stage_ray.errors import Interrupted
from stage_ray.evaluation.loop import Backend, EngineBackend, judge_in_batches, judge_of
from stage_ray.evaluation.partial import PartialResult
from stage_ray.evaluation.searching import searching
from stage_ray.files import digest
from stage_ray.observability.progress import Progress
from stage_ray.pretrained import base_location, located
from stage_ray.records import JudgedGroup, Prompt, RolloutRequest, ScoredGroup
from stage_ray.rewards import build_rewards
from stage_ray.run.run_dir import FREE_NAMES
from stage_ray.run.stop import StopSignal, stops_at_once

GO_ON = "go on with the same command"
# Keys of `policy` and `rollout` that change neither pictures nor scores: they say where and how fast.
FREE = FREE_NAMES | {"path", "lora", "images_per_batch", "threads", "kv_cache_gib", "group_size", "groups_per_step"}


def inputs_of(
    run: RunConfig, prompts: Sequence[Prompt], options: Mapping[str, int], *, scoring: bool = True
) -> dict[str, Any]:
    """All that pictures and scores depend on, by the config's keys: what an evaluation that goes on must have again.

    A model that is on this machine counts by what its files hold, wherever they lie; ``options``: of the command line.
    """
    sections = {"policy": run.policy.model_dump(mode="json"), "rollout": run.rollout.model_dump(mode="json")}
    inputs = {f"{name}.{key}": it for name, keys in sections.items() for key, it in keys.items() if key not in FREE}
    for path in dict.fromkeys((run.policy.path, base_location(run.policy.path))):  # an adapter and its base, or one
        key, directory = "policy.path" if path == run.policy.path else "policy.path: base", located(path)
        inputs[key] = f"files of xxh3 {digest(directory)}" if directory else path
    rewards = run.rewards if scoring else []
    inputs["rewards"] = [judge_of(reward) for reward in rewards]
    texts = json.dumps([[prompt.index, prompt.text, dict(prompt.record)] for prompt in prompts], default=str)
    return inputs | {"prompts": f"{len(prompts)} of xxh3 {xxhash.xxh3_64_hexdigest(texts.encode())}", **options}


@dataclass(frozen=True, slots=True)
class Job:
    """What is drawn for one suite, or one `generate`.

    Attributes:
        run: the config with the scorers that judge it.
        requests: of `requests_for`.
        partial: what is done of it.
        title: of its progress bar.
        use: gets every group that is drawn, with its images, before it counts as done.
        suite: its name in ``evaluation.suites``, where its scorers are not those of the run.
    """

    run: RunConfig
    requests: Sequence[RolloutRequest]
    partial: PartialResult
    title: str
    use: Callable[[JudgedGroup], object] | None = None
    suite: str | None = None

    def left(self) -> list[RolloutRequest]:
        """What is not done."""
        return [request for request in self.requests if request.group_id not in self.partial.groups]

    def keep(self, group: JudgedGroup) -> None:
        """A group is drawn and scored."""
        if self.use is not None:
            self.use(group)
        self.partial.add(group.scored)


def judge(
    run: RunConfig, jobs: Sequence[Job], progress: Progress, *, go_on: str, scoring: bool = True
) -> list[list[ScoredGroup]]:
    """Draw and score what the jobs lack, one after another, with one engine or one cluster (`on_workers`).

    All their scores, job by job in the order of its requests. ``go_on``: how a user goes on after a signal, for its
    sentence; ``scoring``: False draws only.

    Raises:
        ConfigError, RunError: of the engine, the scorers or the cluster.
        Interrupted: by a signal; what was done is in each ``partial``.
    """
    left = [job for job in jobs if job.left()]

    async def work(backend_of: Callable[[Job], Backend]) -> None:
        with suppress(KeyboardInterrupt):  # of `stops_at_once`: it has ended the event loop, which needs no second one
            for job in left:
                await _draw(job, backend_of(job), progress)

    for job in jobs:
        if done := len(job.requests) - len(job.left()):
            progress.note(f"{job.title}: {done} of {len(job.requests)} prompts are there already")
    if left and on_workers(run):
        asyncio.run(_over_cluster(run, work, progress, go_on, scoring))
    elif left:
        with stops_at_once(go_on):
            scorers = {id(job): build_rewards(job.run.rewards) if scoring else [] for job in left}
            with _engine(run, progress) as engine:
                size = run.rollout.images_per_batch
                asyncio.run(work(lambda job: EngineBackend(engine, scorers[id(job)], size)))
    return [[job.partial.groups[request.group_id] for request in job.requests] for job in jobs]


async def _draw(job: Job, backend: Backend, progress: Progress) -> None:
    left, images, at_once = job.left(), job.use is not None, backend.batches_at_once
    with progress.bar(job.title, total=len(job.requests)) as advance:
        advance(len(job.requests) - len(left))
        searched = searching(backend, job.run)
        await judge_in_batches(searched, left, job.keep, images=images, advance=advance, at_once=at_once)


def on_workers(run: RunConfig) -> bool:
    """Whether a config that only draws needs Ray: a cluster is named, or more than this process is to draw."""
    rollout = run.rollout
    return (
        run.cluster.address is not None or max(rollout.workers, rollout.max_workers or 1, rollout.tensor_parallel) > 1
    )


async def _over_cluster(
    run: RunConfig,
    work: Callable[[Callable[[Job], Backend]], Awaitable[None]],
    progress: Progress,
    go_on: str,
    scoring: bool,
) -> None:
    import ray  # late: without workers there is none

    from stage_ray.cluster.backend import ClusterBackend
    from stage_ray.cluster.cluster import InferenceCluster

    logs = Path(tempfile.mkdtemp(prefix="stage-ray-"))
    progress.stage("starting Ray, the rollout engines" + " and the scorers" * scoring)
    try:
        async with StopSignal(progress, go_on), InferenceCluster.start(run, logs, scoring=scoring) as cluster:
            if not run.rollout.gpus and ray.cluster_resources().get("GPU"):
                progress.note(
                    "the cluster has GPUs and these workers reserve none; --set rollout.gpus=1 gives them one"
                )
            await work(lambda job: ClusterBackend(cluster, run, scoring=scoring, suite=job.suite))
    except Interrupted:
        shutil.rmtree(logs)
        raise
    shutil.rmtree(logs)  # any other error names them, so there they stay


@contextmanager
def _engine(run: RunConfig, progress: Progress) -> Iterator[ImageEngine]:
    """The engine of a model in this process; closed at the end."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    progress.stage(f"loading {run.policy.path} into the {run.rollout.engine} engine")
    engine = build_engine(run.policy, run.rollout, worker="local")
    try:
        yield engine
    finally:
        engine.close()
