"""``train --dry-run``: check what can be checked without starting anything, and say what would be started."""

from __future__ import annotations

from pathlib import Path

import yaml

from stage_ray.config import RunConfig
from stage_ray.config.paths import model_location
from stage_ray.recipes import resolve_recipe
from stage_ray.run.preflight import preflight


def describe(run: RunConfig) -> str:
    """The resolved config as YAML, then, as YAML comments, what a run of it would start.

    Raises:
        ConfigError: the model directory or a prompt file is missing, incomplete or malformed.
    """
    train, heldout = preflight(run)
    rollout, scoring, learner = run.rollout, run.scoring, run.learner
    tensor = rollout.tensor_parallel
    images = rollout.groups_per_step * rollout.group_size
    plan = [
        f"model: {model_location(run.policy.path)}",
        f"prompts: {len(train)} to train on, {len(heldout) if run.prompts.heldout else 0} held out",
        f"{run.steps} steps of {rollout.groups_per_step} groups x {rollout.group_size} images = {images} images a step",
        _role(
            *(("rollout worker", rollout.workers) if tensor == 1 else ("rollout process", rollout.workers * tensor)),
            rollout.cpus,
            rollout.gpus,
        )
        + f", engine {rollout.engine}"
        + (f", {tensor} a worker" if tensor > 1 else ""),
        _role("reward worker", scoring.workers, scoring.cpus, scoring.gpus)
        + f", scorers {', '.join(reward.column for reward in run.rewards)}",
        _role("learner" if learner.ranks == 1 else "learner rank", learner.ranks, learner.cpus, learner.gpus)
        + (", on the GPUs of the rollout workers" if rollout.colocated else ""),
        f"run directory: {Path(run.run_dir).resolve()}" + (" (exists)" if Path(run.run_dir).exists() else ""),
    ]
    config = yaml.safe_dump(resolve_recipe(run).model_dump(mode="json"), sort_keys=False).rstrip()
    return "\n".join([config, "", "# Would start:", *(f"#   {line}" for line in plan)])


def _role(name: str, count: int, cpus: float, gpus: float) -> str:
    plural = name if count == 1 else name + ("es" if name.endswith("s") else "s")
    return (
        f"{count} {plural} with {cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "") + (" each" if count > 1 else "")
    )
