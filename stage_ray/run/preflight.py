"""What can be checked before anything is started or written; ``train --dry-run`` prints it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import yaml

from stage_ray.config import RunConfig
from stage_ray.config.paths import model_location
from stage_ray.engines.vllm.environment import require_fitting_build
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import find_benchmark
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.policies import policy_class
from stage_ray.policies.base import ImageCodec
from stage_ray.policies.reference import check_reference
from stage_ray.pretrained import located
from stage_ray.recipes import load_recipe, resolve_recipe
from stage_ray.records import Prompt
from stage_ray.rewards import check_rewards

log = logging.getLogger(__name__)

SHOWN = 3  # prompts that an error names


def preflight(run: RunConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Check the recipe's options and the model directory (a hub id is left to the workers); the prompts to train on,
    and those held out.

    Where the workers will run on this machine, also that its vLLM is one for the hardware they reserve.

    Raises:
        ConfigError: the recipe, the model family or the benchmark is unknown, the recipe has no such option or value,
            vLLM is a build for GPUs and none is reserved, or the model directory or a prompt file is missing,
            incomplete or malformed.
    """
    load_recipe(run)
    if run.cluster.address is None and "RAY_ADDRESS" not in os.environ:  # the run starts Ray here
        require_fitting_build(run.rollout)
    find_benchmark(run.evaluation.benchmark)
    train = load_prompts(run.prompts.train)
    heldout = load_prompts(run.prompts.heldout) if run.prompts.heldout else []
    _require_scorable(run, train + heldout * run.evaluation.enabled)
    codec = policy_class(run.policy).check(run.policy)
    check_reference(run.policy)
    train = drawable_prompts(run, codec, train)
    return train, drawable_prompts(run, codec, heldout) if heldout else train


def drawable_prompts(run: RunConfig, codec: ImageCodec | None, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts that the model (``codec``: of `Policy.check`) has room for.

    All of them, unless ``prompts.too_long`` is drop; a model that is not here has none that is too long.

    Raises:
        ConfigError: one cannot be drawn and is not to be dropped, or none can; names their lines.
    """
    if codec is None:
        return prompts
    kept, problems = [], []
    for prompt in prompts:
        try:
            codec.check_prompt(prompt.text, run.rollout.max_prompt_tokens)
            kept.append(prompt)
        except ValueError as error:
            problems.append(f"{prompt.where or '--prompt'}: {error}")
    if problems and (run.prompts.too_long == "refuse" or not kept):
        raise ConfigError(
            f"{len(problems)} of {len(prompts)} prompts cannot be drawn: {_some(problems)}; shorten them, raise "
            "rollout.max_prompt_tokens where the model has room, or set prompts.too_long=drop"
        )
    if problems:
        log.warning("%d of %d prompts are dropped: %s", len(problems), len(prompts), _some(problems))
    return kept


def _require_scorable(run: RunConfig, prompts: list[Prompt]) -> None:
    """Raise a ConfigError that names the first prompts which a scorer could not judge: the run would fail on them."""
    if problems := check_rewards(run.rewards, prompts):
        some = _some([f"{prompt.where}: {why}" for prompt, why in problems])
        raise ConfigError(f"{len(problems)} of {len(prompts)} prompts cannot be scored: {some}")


def _some(problems: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def unchecked(run: RunConfig) -> list[str]:
    """Models and scorers that are not on this machine, as ``key = value``: the workers would fetch them."""
    paths = {"policy.path": run.policy.path}
    paths |= {"policy.reference": run.policy.reference} if run.policy.reference else {}
    for index, reward in enumerate(run.rewards):
        paths |= {f"rewards.{index}.options.path": str(reward.options["path"])} if "path" in reward.options else {}
    return [f"{key} = {path}" for key, path in paths.items() if located(path) is None]


def describe(run: RunConfig, *, strict: bool = False) -> str:
    """The resolved config as YAML, then, as YAML comments, what a run of it would start, and what was not checked.

    Raises:
        ConfigError: of `preflight`; or, if ``strict``, something could not be checked.
    """
    train, heldout = preflight(run)
    left = unchecked(run)
    if left and strict:
        raise ConfigError(f"--strict: not checked, since it would be fetched: {'; '.join(left)}")
    rollout, scoring, learner = run.rollout, run.scoring, run.learner
    images = rollout.groups_per_step * rollout.group_size
    scorers = ", ".join(reward.column for reward in run.rewards)
    where = "; on the GPUs of the rollout workers" * rollout.colocated  # "" where not
    config = yaml.safe_dump(resolve_recipe(run).model_dump(mode="json"), sort_keys=False).rstrip()
    plan = [
        f"model: {model_location(run.policy.path)}",
        f"reference: {model_location(run.policy.reference or run.policy.path)}",
        f"prompts: {len(train)} to train on, {len(heldout) if run.prompts.heldout else 0} held out",
        f"{run.steps} steps of {rollout.groups_per_step} groups x {rollout.group_size} images = {images} images a step",
        f"rollout: {rollout.workers * rollout.tensor_parallel} x {rollout.cpus:g} CPU, {rollout.gpus:g} GPU; "
        f"engine {rollout.engine}",
        f"reward: {scoring.workers} x {scoring.cpus:g} CPU, {scoring.gpus:g} GPU; scorers {scorers}",
        f"learner: {learner.ranks} x {learner.cpus:g} CPU, {learner.gpus:g} GPU{where}",
        f"run directory: {Path(run.run_dir).resolve()}" + " (exists)" * Path(run.run_dir).exists(),
        *(f"not checked: would be fetched: {name}" for name in left),
    ]
    return "\n".join([config, "", "# Would start:", *(f"#   {line}" for line in plan)])
