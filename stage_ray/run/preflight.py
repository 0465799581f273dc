"""What can be checked before anything is started or written; ``train --dry-run`` prints it."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from stage_ray.cluster.object_store import two_versions_mb
from stage_ray.config import RewardConfig, RunConfig
from stage_ray.config.hub import cached, download, is_pinned, named
from stage_ray.config.inputs import checkpoint_inputs, files_of, hub_inputs, takes_prompts
from stage_ray.engines.vllm.environment import require_fitting_build
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import find_benchmark
from stage_ray.evaluation.searching import check_search
from stage_ray.evaluation.suites import resolve_suites
from stage_ray.observability.trackers import check_trackers
from stage_ray.pipeline.prompt_files import load_mix, load_prompts
from stage_ray.policies import check_adapters, policy_class
from stage_ray.policies.codec import ImageCodec
from stage_ray.policies.reference import check_reference, reference_location
from stage_ray.pretrained import located
from stage_ray.recipes import load_recipe
from stage_ray.records import Prompt
from stage_ray.rewards import check_rewards
from stage_ray.rewards.routing import is_asked
from stage_ray.run.run_dir import resolved
from stage_ray.samplers import EmbeddingTransform, load_rule, load_search, load_transform, training_search

if TYPE_CHECKING:
    from huggingface_hub import HfUri

log = logging.getLogger(__name__)

SHOWN = 3  # prompts that an error names


class RunPrompts(NamedTuple):
    """The prompts of a run: to train on, held out (for the samples the same without any), of each further suite.

    ``longest``: tokens of the longest of all of them; None where that is not known before they are drawn.
    """

    train: list[Prompt]
    heldout: list[Prompt]
    suites: dict[str, list[Prompt]]
    longest: int | None = None

    def reserve(self, run: RunConfig) -> RunConfig:
        """The config for the workers: memory for prompts is that of the longest one, no longer for any that may be.

        They refuse a longer one by its text. A learner finds its micro-batches with it too.
        """
        longest = run.rollout.max_prompt_tokens if self.longest is None else self.longest
        rollout = run.rollout.model_copy(update={"max_prompt_tokens": longest})
        return run.model_copy(update={"rollout": rollout})


def preflight(run: RunConfig, *, fetch: bool = True) -> RunPrompts:
    """Check options, prompts and models of a run of `resolve_suites`; its prompts.

    Where the workers will run on this machine, its vLLM must be one for the hardware they reserve, the object store
    must have room for the weights, and what `pin` has pinned is fetched now; elsewhere each node fetches it. Without
    ``fetch`` only what is here already is checked.

    Raises:
        ConfigError: the first thing that is unknown, missing, malformed or too small.
    """
    load_recipe(run)
    rule = load_rule(run.rollout)
    _require_trainable(run)
    check_trackers(run.logs)
    starts_ray_here = run.cluster.address is None and "RAY_ADDRESS" not in os.environ
    if starts_ray_here:
        require_fitting_build(run.rollout)
    find_benchmark(run.evaluation.benchmark)
    left = {} if fetch else unfetched(run)
    train = load_mix(run.prompts, without=left)
    heldout = load_prompts(run.prompts.heldout) if run.prompts.heldout and "prompts.heldout" not in left else []
    if fetch and starts_ray_here:
        for key, uri in unfetched(run).items():
            if is_pinned(uri):  # else it is a text that a scorer of the user's own reads in its own way
                download(uri, files_of(key), key)
    pools = [pool for pool in run.scoring_pools if not pool.runtime_env.brings_packages]  # the others are not here
    here = [column for pool in pools for column in pool.columns]
    if not left:
        _require_matches(run, train + heldout * run.evaluation.enabled)
    _require_scorable(run.rewards, train + heldout * run.evaluation.enabled, "rewards", here)
    measuring = [measure.reward for measure in run.evaluation.measures if measure.scorer and run.evaluation.enabled]
    _require_scorable(measuring, heldout, "evaluation.measures")
    suites = _suite_prompts(run, left)
    codec = policy_class(run.policy).check(run.policy)
    if codec is not None:
        rule.check(codec)
    check_reference(run.policy)
    check_adapters(run.policy)
    if starts_ray_here:
        _require_room_for_weights(run)
    lengths: list[int] = []
    by_file = [list(prompts) for _, prompts in groupby(train, lambda prompt: prompt.source)]
    # Some of each file are left.
    train = [prompt for prompts in by_file for prompt in drawable_prompts(run, codec, prompts, lengths)]
    suites = {name: drawable_prompts(run, codec, prompts, lengths) for name, prompts in suites.items()}
    heldout = drawable_prompts(run, codec, heldout, lengths) if heldout else train
    # A transform may write another text for every seed, so what it makes of one says nothing about the others.
    known = codec is not None and run.rollout.prompt_transform is None and not left and not _rewrites(run)
    return RunPrompts(train, heldout, suites, max(lengths) if known else None)


def drawable_prompts(
    run: RunConfig, codec: ImageCodec | None, prompts: list[Prompt], lengths: list[int] | None = None
) -> list[Prompt]:
    """The prompts that the model (``codec``: of `Policy.check`) has room for; their tokens are added to ``lengths``.

    A model that is not here has none that is too long.

    Raises:
        ConfigError: one is too long and ``prompts.too_long`` is refuse, or all are; names their lines.
    """
    transform = load_transform(run.rollout)
    if codec is None:
        return prompts
    kept, problems = [], []
    for prompt in prompts:
        try:
            drawn = prompt if transform is None else transform.apply(prompt, seed=0)
            ids = codec.check_prompt(drawn.drawn_text, run.rollout.max_prompt_tokens)
            kept.append(prompt)
            if lengths is not None:
                lengths.append(ids.longest)
        except ValueError as error:
            made = f", which {run.rollout.prompt_transform} makes of {prompt.text[:80]!r}" if transform else ""
            problems.append(f"{prompt.where or '--prompt'}: {error}{made}")
    if problems and (run.prompts.too_long == "refuse" or not kept):
        raise ConfigError(
            f"{len(problems)} of {len(prompts)} prompts cannot be drawn: {_some(problems)}; correct or shorten them, "
            "raise rollout.max_prompt_tokens where the model has room, or set prompts.too_long=drop"
        )
    if problems:
        log.warning("%d of %d prompts are dropped: %s", len(problems), len(prompts), _some(problems))
    return kept


def _require_trainable(run: RunConfig) -> None:
    """Raise a ConfigError where images would not be those of the distribution that the learner scores."""
    training_search(run)
    transform = load_transform(run.rollout)
    if isinstance(transform, EmbeddingTransform) and not transform.off_policy:
        raise ConfigError(
            f"rollout.prompt_transform = {run.rollout.prompt_transform!r} would train on images of prompts that were "
            "moved in embedding space, and the learner scores them under the prompt itself; set it to null here, or to "
            "a transform of text, or accept that with rollout.prompt_transform_options.off_policy=true"
        )


def _require_room_for_weights(run: RunConfig) -> None:
    """Raise a ConfigError where every version would spill to disk on its way to the rollout workers."""
    given, needed = run.cluster.object_store_mb, two_versions_mb(run)
    if given and needed and given < needed and run.cluster.weight_transport == "object_store":
        raise ConfigError(
            f"cluster.object_store_mb = {given} is less than two versions of the weights, one served and one stored, "
            f"which need {needed} MB; set it to null, or to more than that"
        )


def _suite_prompts(run: RunConfig, left: Collection[str]) -> dict[str, list[Prompt]]:
    """The prompts of each further suite by its name, those ``left`` for later without any; its scorers are checked."""
    found: dict[str, list[Prompt]] = {}
    for number, suite in enumerate(run.evaluation.suites if run.evaluation.enabled else []):
        key = f"evaluation.suites.{number}"
        benchmark, left_out = find_benchmark(suite.benchmark), f"{key}.prompts" in left
        prompts = [] if left_out else benchmark.load(suite.prompts or "", load_prompts)
        _require_scorable(suite.rewards or [], prompts, f"{key}.rewards")
        check_search(suite, suite.rewards or [], prompts, key)
        found[str(suite.name)] = prompts
    return found


def _rewrites(run: RunConfig) -> bool:
    """Whether the search of a suite draws other texts than the prompts."""
    searches = (
        load_search(suite, [reward.column for reward in suite.rewards or []]) for suite in run.evaluation.suites
    )
    return any(search.rewrites for search in searches if search is not None)


def _require_scorable(
    rewards: Sequence[RewardConfig], prompts: list[Prompt], key: str, columns: Sequence[str] | None = None
) -> None:
    """Raise a ConfigError that names the first prompts which a scorer (of ``columns``) could not judge in the run."""
    if problems := check_rewards(rewards, prompts, columns, key):
        some = _some([f"{prompt.where}: {why}" for prompt, why in problems])
        raise ConfigError(f"{len(problems)} of {len(prompts)} prompts cannot be scored: {some}")


def _require_matches(run: RunConfig, prompts: list[Prompt]) -> None:
    """Raise a ConfigError where a ``when`` matches no prompt: its key or value is then mistyped."""
    for index, reward in enumerate(run.rewards):
        if not any(is_asked(reward.when, prompt) for prompt in prompts):
            keys = ", ".join(dict.fromkeys(key for prompt in prompts for key in prompt.record))
            raise ConfigError(
                f"rewards.{index}.when = {reward.when} matches none of {len(prompts)} prompts, whose keys are {keys}"
            )


def _some(problems: list[str]) -> str:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def unfetched(run: RunConfig) -> dict[str, HfUri]:
    """What a config names in a hub and is not, or not whole, in the cache of this machine."""

    def in_cache(key: str, uri: HfUri) -> Path | None:
        return cached(uri, files_of(key)) if takes_prompts(key) else located(uri.to_uri())

    wanted = hub_inputs(run) | checkpoint_inputs(run)
    return {key: uri for key, uri in wanted.items() if in_cache(key, uri) is None}


def describe(run: RunConfig, *, strict: bool = False) -> str:
    """The resolved config as YAML, then, as YAML comments, what a run of it would start, and what was not checked.

    Raises:
        ConfigError: of `preflight`; or, if ``strict``, something could not be checked.
    """
    run = resolve_suites(run)
    train, heldout, suites, _ = preflight(run, fetch=False)
    left = [f"{key} = {named(uri)}" + " (newest)" * (uri.revision is None) for key, uri in unfetched(run).items()]
    if left and strict:
        raise ConfigError(f"--strict: not checked, since it would be fetched: {'; '.join(left)}")
    rollout, learner = run.rollout, run.learner
    images, search = rollout.groups_per_step * rollout.group_size, training_search(run)
    chosen = "" if search is None else f", each the {rollout.search} of {search.candidates} drawn"
    where = "; on the GPUs of the rollout workers" * rollout.colocated  # "" where not
    config = yaml.safe_dump(resolved(run).model_dump(mode="json"), sort_keys=False).rstrip()
    anchor = reference_location(run.policy)
    plan = [
        f"model: {located(run.policy.path) or run.policy.path}",
        f"reference: {located(anchor) or anchor}",
        f"prompts: {_counted(run, train)} to train on, {len(heldout) if run.prompts.heldout else 0} held out",
        *(f"suite {name}: {len(prompts)} prompts" for name, prompts in suites.items()),
        f"{run.steps} steps of {rollout.groups_per_step} groups x {rollout.group_size} images = {images} images a step"
        + chosen,
        f"rollout: {rollout.workers * rollout.tensor_parallel} x {rollout.cpus:g} CPU, {rollout.gpus:g} GPU; "
        f"engine {rollout.engine}",
        *(
            f"{pool.role}: {pool.workers} x {pool.cpus:g} CPU, {pool.gpus:g} GPU; scorers {', '.join(pool.columns)}"
            for pool in run.scoring_pools
        ),
        f"learner: {learner.ranks} x {learner.cpus:g} CPU, {learner.gpus:g} GPU{where}",
        f"run directory: {Path(run.run_dir).resolve()}" + " (exists)" * Path(run.run_dir).exists(),
        *(f"not checked: would be fetched: {name}" for name in left),
    ]
    return "\n".join([config, "", "# Would start:", *(f"#   {line}" for line in plan)])


def _counted(run: RunConfig, train: list[Prompt]) -> str:
    if isinstance(run.prompts.train, str):
        return str(len(train))
    counts = Counter(prompt.source for prompt in train)
    files = enumerate(run.prompts.train)
    return ", ".join(f"{counts[source]} of {file.path} (weight {file.weight:g})" for source, file in files)
