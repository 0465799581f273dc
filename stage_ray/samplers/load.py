"""From a config's names and options to samplers of all three kinds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from stage_ray.config import RolloutConfig, RunConfig, Section, SuiteConfig
from stage_ray.errors import ConfigError, impossible, suggest
from stage_ray.registry import Registry
from stage_ray.samplers.base import ChoosingSearch, EmbeddingTransform, ImageSearch, PromptTransform, TokenRule

SAMPLERS = Registry("stage_ray.samplers", "Rule", "sampler")
TRANSFORMS = Registry("stage_ray.samplers", "Transform", "prompt transform")
SEARCHES = Registry("stage_ray.samplers", "Search", "search over images")


def load_rule(rollout: RolloutConfig) -> TokenRule:
    """The token rule that a config names, its options checked.

    Raises:
        ConfigError: no such rule, an option that it does not have (with the nearest one), or an impossible value.

    Example:
        >>> load_rule(RolloutConfig(sampler="entropy_informed", sampler_options={"b": 2}))
        EntropyInformedRule(a=2.5, b=2.0, c=0.6)
    """
    rule: TokenRule = _load(TokenRule, SAMPLERS, rollout.sampler, rollout.sampler_options, "rollout.sampler")
    return rule


def load_transform(rollout: RolloutConfig) -> PromptTransform | None:
    """The prompt transform that a config names, None without one.

    Raises:
        ConfigError: as `load_rule`; or it moves embeddings, which only the torch engine takes.
    """
    name, options = rollout.prompt_transform, rollout.prompt_transform_options
    transform: PromptTransform | None = _load(PromptTransform, TRANSFORMS, name, options, "rollout.prompt_transform")
    if isinstance(transform, EmbeddingTransform) and rollout.engine != "torch":
        raise ConfigError(
            f"rollout.prompt_transform = {name!r} moves the prompts' embeddings, by gradients of the model, which "
            f"rollout.engine = {rollout.engine} does not give; set rollout.engine=torch"
        )
    return transform


def load_search(
    config: RolloutConfig | SuiteConfig, scorers: Sequence[str], key: str = "rollout"
) -> ImageSearch | None:
    """The search over images that a section names, None without one.

    Args:
        scorers: columns of the scorers that will judge.
        key: of the section.

    Raises:
        ConfigError: as `load_rule`; or it needs a scorer that is not among these.
    """
    search: ImageSearch | None = _load(ImageSearch, SEARCHES, config.search, config.search_options, f"{key}.search")
    if search is not None and (needed := search.scorer) is not None and needed not in scorers:
        raise ConfigError(f"{key}.search_options.scorer = {needed!r} is no scorer here; {suggest(needed, scorers)}")
    return search


def training_search(run: RunConfig) -> ChoosingSearch | None:
    """The search through which a run trains, None without one.

    Raises:
        ConfigError: as `load_search`; or a run cannot train through it, or its bias was not accepted.
    """
    name, search = run.rollout.search, load_search(run.rollout, [reward.column for reward in run.rewards])
    if search is None:
        return None
    apart = "it is for evaluate and generate, and a suite of evaluation.suites has a search of its own"
    if not isinstance(search, ChoosingSearch):
        raise ConfigError(
            f"rollout.search = {name!r} asks more than the scores of candidates, which a run cannot train through; "
            f"set it to best_of or null here: {apart}"
        )
    if not search.biased:
        raise ConfigError(
            f"rollout.search = {name!r} would train on images that a scorer chose, and their log-probabilities leave "
            f"the choice out; set it to null here ({apart}), or accept the bias with rollout.search_options.biased=true"
        )
    return search


def resolve_samplers(run: RunConfig) -> RunConfig:
    """The same run, with every option of its samplers, defaults included; raises as those are loaded."""
    rollout, columns = run.rollout, [reward.column for reward in run.rewards]
    found = {
        "sampler": load_rule(rollout),
        "prompt_transform": load_transform(rollout),
        "search": load_search(rollout, columns),
    }
    options = {f"{key}_options": it.model_dump(mode="json") for key, it in found.items() if it is not None}
    return run.model_copy(update={"rollout": rollout.model_copy(update=options)})


def _load(base: type[Section], registry: Registry, name: str | None, options: Mapping[str, Any], key: str) -> Any:
    """The sampler that ``key`` names; None where it names none, and then there may be no option either."""
    if name is None:
        for option in options:
            raise ConfigError(f"{key}_options.{option} is set, and {key} is null; set {key} to a {registry.what}")
        return None
    kind = registry.find(name, key)
    if not (isinstance(kind, type) and issubclass(kind, base)) or inspect.isabstract(kind):
        raise ConfigError(f"{key} = {name!r} is no class that derives from stage_ray.samplers.{base.__name__}")
    for option, value in options.items():
        if option not in kind.model_fields:
            fix = suggest(option, kind.model_fields, f"{key}_options.") if kind.model_fields else "it has none"
            raise ConfigError(f"{key}_options.{option} = {value!r} is no option of {registry.what} {name}: {fix}")
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(_problem(f"{key}_options", registry, name, item) for item in error.errors())
        ) from error


def _problem(key: str, registry: Registry, name: str, error: Mapping[str, Any]) -> str:
    option = ".".join([key, *map(str, error["loc"])])
    return (
        f"{option} is missing: {registry.what} {name} needs it"
        if error["type"] == "missing"
        else impossible(option, error)
    )
