"""What can be known to be wrong before anything is started or written."""

from __future__ import annotations

import os
from pathlib import Path

from stage_ray.config import RunConfig
from stage_ray.config.paths import model_location
from stage_ray.engines.vllm.environment import require_fitting_build
from stage_ray.pipeline.prompts import load_prompts
from stage_ray.policies import policy_class
from stage_ray.policies.checkpoint_files import check_directory
from stage_ray.recipes import load_recipe
from stage_ray.records import Prompt


def preflight(run: RunConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Check the recipe's options and the model directory (a hub id is left to the workers), and read the prompts.

    Where the workers will run on this machine, also that its vLLM is one for the hardware they reserve.

    Returns:
        The prompts to train on, and those held out.

    Raises:
        ConfigError: the recipe or the model family is unknown, the recipe has no such option or value, vLLM is a build
            for GPUs and none is reserved, or the model directory or a prompt file is missing, incomplete or malformed.
    """
    load_recipe(run)
    if run.cluster.address is None and "RAY_ADDRESS" not in os.environ:
        require_fitting_build(run.rollout)
    family = policy_class(run.policy)
    model = Path(model_location(run.policy.path))
    if model.exists():
        check_directory(model, family.model_type)
    train = load_prompts(run.prompts.train)
    return train, load_prompts(run.prompts.heldout) if run.prompts.heldout else train
