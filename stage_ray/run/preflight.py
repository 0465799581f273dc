"""What can be known to be wrong before anything is started or written."""

from __future__ import annotations

import os
from pathlib import Path

from stage_ray.config import RunConfig
from stage_ray.config.paths import model_location
from stage_ray.engines.vllm.environment import require_fitting_build
from stage_ray.evaluation.base import find_benchmark
from stage_ray.pipeline.prompts import load_prompts
from stage_ray.policies.checkpoint_files import check_directory
from stage_ray.records import Prompt


def preflight(run: RunConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Check the model directory (a hub id is left to the workers) and read the prompts: to train on, and held out.

    Where the workers will run on this machine, also that its vLLM is one for the hardware they reserve.

    Raises:
        ConfigError: vLLM is a build for GPUs and none is reserved, the model directory or a prompt file is missing,
            incomplete or malformed, or there is no such benchmark.
    """
    if run.cluster.address is None and "RAY_ADDRESS" not in os.environ:
        require_fitting_build(run.rollout)
    model = Path(model_location(run.policy.path))
    if model.exists():
        check_directory(model, run.policy.family)
    find_benchmark(run.evaluation.benchmark)
    train = load_prompts(run.prompts.train)
    return train, load_prompts(run.prompts.heldout) if run.prompts.heldout else train
