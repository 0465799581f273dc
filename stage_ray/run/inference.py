"""Prompts drawn and scored apart from training: by an engine of this process, or by the workers of a cluster."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from stage_ray.config import RunConfig
from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageEngine
from stage_ray.errors import Interrupted
from stage_ray.evaluation.loop import Backend, EngineBackend, JudgedGroup, judge_in_batches, judge_of, searching
from stage_ray.evaluation.partial import PartialResult
from stage_ray.files import digest
from stage_ray.observability.progress import Progress
from stage_ray.pretrained import located
from stage_ray.records import Prompt, RolloutRequest, ScoredGroup
from stage_ray.rewards import build_rewards
from stage_ray.run.run_dir import FREE_NAMES
from stage_ray.run.stop import StopSignal, stops_at_once

# Keys of `policy` and `rollout` that change neither pictures nor scores: they say where and how fast.
FREE = FREE_NAMES | {"path", "images_per_batch", "threads", "kv_cache_gib", "group_size", "groups_per_step"}


def inputs_of(
    run: RunConfig, prompts: Sequence[Prompt], options: Mapping[str, int], *, scoring: bool = True
) -> dict[str, Any]:
    """All that pictures and scores depend on, by the config's keys: what an evaluation that goes on must have again.

    A model that is on this machine counts by what its files hold, wherever they lie; ``options``: of the command line.
    """
    sections = {"policy": run.policy.model_dump(mode="json"), "rollout": run.rollout.model_dump(mode="json")}
    inputs = {f"{name}.{key}": it for name, keys in sections.items() for key, it in keys.items() if key not in FREE}
    directory = located(run.policy.path)
    inputs["policy.path"] = f"files of xxh3 {digest(directory)}" if directory else run.policy.path
    rewards = run.rewards if scoring else []
    inputs["rewards"] = [judge_of(reward) for reward in rewards]
    texts = json.dumps([[prompt.index, prompt.text, dict(prompt.record)] for prompt in prompts], default=str)
    return inputs | {"prompts": f"{len(prompts)} of xxh3 {xxhash.xxh3_64_hexdigest(texts.encode())}", **options}


def judge(
    run: RunConfig,
    requests: Sequence[RolloutRequest],
    partial: PartialResult,
    progress: Progress,
    *,
    title: str,
    go_on: str,
    scoring: bool = True,
    use: Callable[[JudgedGroup], object] | None = None,
) -> list[ScoredGroup]:
    """Draw and score what ``partial`` lacks, in this process or on workers (`on_workers`); all scores, in their order.

    Args:
        requests: of `requests_for`.
        title, go_on: of the progress bar; and how a user goes on after a signal, for its sentence.
        scoring: False draws only.
        use: gets every group that is drawn, with its images, before it counts as done.

    Raises:
        ConfigError, RunError: of the engine, the scorers or the cluster.
        Interrupted: by a signal; what was done is in ``partial``.
    """
    left = [request for request in requests if request.group_id not in partial.groups]

    def keep(group: JudgedGroup) -> None:
        if use is not None:
            use(group)
        partial.add(group.scored)

    async def work(backend: Backend) -> None:
        with (
            suppress(KeyboardInterrupt),  # of `stops_at_once`: it has ended the event loop, which needs no second one
            progress.bar(title, total=len(requests)) as advance,
        ):
            advance(len(requests) - len(left))
            images, at_once, backend = use is not None, backend.batches_at_once, searching(backend, run)
            await judge_in_batches(backend, left, keep, images=images, advance=advance, at_once=at_once)

    if len(left) < len(requests):
        progress.note(f"{title}: {len(requests) - len(left)} of {len(requests)} prompts are there already")
    if left and on_workers(run):
        asyncio.run(_over_cluster(run, work, progress, go_on, scoring))
    elif left:
        with stops_at_once(go_on):
            scorers = build_rewards(run.rewards) if scoring else []
            with _engine(run, progress) as engine:
                asyncio.run(work(EngineBackend(engine, scorers, run.rollout.images_per_batch)))
    return [partial.groups[request.group_id] for request in requests]


def on_workers(run: RunConfig) -> bool:
    """Whether a config that only draws needs Ray: a cluster is named, or more than this process is to draw."""
    rollout = run.rollout
    return (
        run.cluster.address is not None or max(rollout.workers, rollout.max_workers or 1, rollout.tensor_parallel) > 1
    )


async def _over_cluster(
    run: RunConfig, work: Callable[[Backend], Awaitable[None]], progress: Progress, go_on: str, scoring: bool
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
            await work(ClusterBackend(cluster, run, scoring=scoring))
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
