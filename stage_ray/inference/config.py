"""The config of a run that only draws, and scores, with one model; what a command line leaves out is decided here."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage_ray.config import RewardConfig, RunConfig
from stage_ray.config.hardware import usable_cpus
from stage_ray.config.load import validate_config
from stage_ray.engines.vllm.environment import require_fitting_build
from stage_ray.errors import ConfigError, RunError
from stage_ray.evaluation.base import Benchmark
from stage_ray.evaluation.searching import check_search
from stage_ray.policies import family_of
from stage_ray.pretrained import base_location
from stage_ray.records import Prompt
from stage_ray.rewards import check_rewards
from stage_ray.run.preflight import SHOWN
from stage_ray.samplers import resolve_samplers

IMAGES_PER_BATCH = 64  # drawn at once, where as many are asked for
JUDGE = "vlm_questions"  # the scorer that asks the model of --judge
NO_REWARD = RewardConfig(type="none")  # where nothing is scored


def inference_config(
    model: str | Path,
    engine: str | None,
    guidance: float,
    address: str | None,
    workers: int | None,
    overrides: Sequence[str] | None,
    *,
    images: int,
    benchmarks: Sequence[Benchmark] = (),
    by: str | None = None,
) -> RunConfig:
    """The config of a run that draws ``images`` in all, on a GPU where there is one; ``overrides`` as of ``--set``.

    The first benchmark's scorers are the run's; the others are its ``evaluation.suites``. ``by``: as ``--judge``.

    Raises:
        ConfigError: a wrong argument, by the name of the command's option.
    """
    if images < 1:
        raise ConfigError(f"{images} images are asked for; ask for one of each prompt at least")
    if len(benchmarks) > 1 and any(override.startswith("rewards") for override in overrides or ()):
        raise ConfigError("--set rewards: of which suite? Evaluate one alone with it, or name a judge with --judge")
    first, *others = [_scorers(benchmark, by) for benchmark in benchmarks] or [[NO_REWARD.model_dump()]]
    further = [
        {"benchmark": benchmark.name, "name": benchmark.name, "rewards": rewards}
        for benchmark, rewards in zip(benchmarks[1:], others, strict=True)
    ]
    engine = engine or ("vllm" if importlib.util.find_spec("vllm") else "torch")
    shares = _shares(images, workers or 1, here=address is None)
    data = {
        "steps": 1,
        "policy": _policy(model),
        "prompts": {"train": "-"},  # those of the command line are drawn
        "rewards": first,
        "evaluation": {"enabled": bool(further), "suites": further},
        "rollout": {"engine": engine, "guidance_scale": guidance, **shares},
        "cluster": {"address": address},
    }
    run = validate_config(data, overrides, source="--set")
    resolve_samplers(run)  # a wrong option is said before anything starts
    scorers = [*run.rewards, *(reward for suite in run.evaluation.suites for reward in suite.rewards or [])]
    if any(reward.type == JUDGE and "model" not in reward.options for reward in scorers):
        raise ConfigError(
            "a suite is judged by a model that answers questions, and none is named; give --judge MODEL@URL, such as "
            "--judge Qwen3-VL-8B-Instruct@http://127.0.0.1:8000/v1"
        )
    if run.rollout.search is not None and run.rewards == [NO_REWARD]:
        raise ConfigError(f"rollout.search = {run.rollout.search!r} chooses by a scorer; name one in rewards")
    if run.cluster.address is None:  # else vLLM runs elsewhere
        require_fitting_build(run.rollout)
    return run


def _policy(model: str | Path) -> dict[str, str]:
    """The section ``policy``: whole paths, since a cluster's workers are not where the command was given."""
    base = Path(base_location(str(model)) if Path(model).exists() else model)  # of an adapter
    family = (base / "config.json").is_file() and family_of(base, "policy.path")
    path = str(Path(model).absolute() if Path(model).exists() else model)
    return {"path": path} | ({"family": family} if family else {})


def _shares(images: int, workers: int, here: bool) -> dict[str, Any]:
    """What of the hardware each of so many rollout workers has, and how many images it draws at once."""
    import torch  # late, as in the rest of this room

    shares: dict[str, Any] = {
        "workers": workers,
        "gpus": min(1, torch.cuda.device_count()),
        "gpu_memory_utilization": 0.85,
        "images_per_batch": min(math.ceil(images / workers), IMAGES_PER_BATCH),  # one for every worker at least
    }
    if here:  # all of this machine, shared by the workers; a cluster's nodes are not known here
        shares["cpus"] = shares["threads"] = max(1, usable_cpus() // workers)
    return shares


def _scorers(benchmark: Benchmark, by: str | None) -> list[dict[str, Any]]:
    """Those of a benchmark; the endpoint of ``--judge`` answers its questions."""
    named = re.fullmatch(r"(.+)@(https?://.+)", by or "")
    if by and not named:
        raise ConfigError(f"--judge {by} is no MODEL@URL, such as Qwen3-VL-8B-Instruct@http://127.0.0.1:8000/v1")
    rewards = [reward.model_dump() for reward in benchmark.rewards] or [NO_REWARD.model_dump()]
    for reward in rewards:
        if named and reward["type"] == JUDGE:
            reward["options"] = {**reward["options"], "model": named[1], "url": named[2]}
    return rewards


def require_judgeable(run: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Say which prompts the scorers cannot judge, the first of them; a RunError where they can judge none."""
    check_search(run.rollout, run.rewards, prompts, "rollout")
    unjudged = check_rewards(run.rewards, prompts)
    for prompt, why in unjudged[:SHOWN]:
        print(f"{prompt.where}: {why}", file=sys.stderr)
    if len({prompt.index for prompt, _ in unjudged}) == len(prompts):
        raise RunError(f"none of {len(prompts)} prompts can be judged, so there is nothing to measure")
