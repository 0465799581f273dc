"""From a config's ``rewards`` to scorers: names, dotted paths, and options checked before anything is loaded."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, get_args, get_origin, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from stage_ray.config import RewardConfig
from stage_ray.config.inputs import MODEL_KEYS
from stage_ray.config.load import REVISION
from stage_ray.errors import ConfigError, impossible
from stage_ray.records import Prompt
from stage_ray.registry import Registry
from stage_ray.rewards.routing import Routed, Scorer, is_asked

REWARDS = Registry("stage_ray.rewards", "Reward", "scorer")
METHODS = ("score(images, prompts)", "score_groups(groups)")  # a scorer has one of them


def build_rewards(
    configs: Sequence[RewardConfig], columns: Sequence[str] | None = None, key: str = "rewards"
) -> list[tuple[str, Scorer]]:
    """Build the scorers of a list, all or those of some ``columns``, with their columns; ``key`` is the list's.

    Raises:
        ConfigError: an unknown scorer, or options that its constructor does not take; names the key and the fix.

    Example:
        build_rewards([RewardConfig(type="geneval", options={"detector": "my_package.MyDetector"})])
    """
    found = []
    for config, place in _chosen(configs, columns, key):
        scorer = build_reward(config, place)
        found.append((config.column, Routed(scorer, config.when) if config.when else scorer))
    return found


def check_rewards(
    configs: Sequence[RewardConfig],
    prompts: Sequence[Prompt],
    columns: Sequence[str] | None = None,
    key: str = "rewards",
) -> list[tuple[Prompt, str]]:
    """Check scorers of a list without building them: the prompts that one cannot judge, and why, scorer by scorer.

    A scorer is asked about the prompts of its ``when`` only; at the end come prompts that no scorer of the list wants.

    Raises:
        ConfigError: as `build_rewards`, and what a scorer's own `check` finds wrong with its options.
    """
    unjudged = [
        (prompt, f"{config.column}: {why}")
        for config, place in _chosen(configs, columns, key)
        for prompt, why in check_reward(config, [one for one in prompts if is_asked(config.when, one)], place)
    ]
    routes = "; ".join(f"{config.column} when {config.when}" for config in configs)
    left_out = [prompt for prompt in prompts if not any(is_asked(config.when, prompt) for config in configs)]
    return unjudged + [(prompt, f"no scorer is asked about it: {routes}") for prompt in left_out if configs]


def _chosen(configs: Sequence[RewardConfig], columns: Sequence[str] | None, key: str) -> list[tuple[RewardConfig, str]]:
    return [(c, f"{key}.{i}") for i, c in enumerate(configs) if columns is None or c.column in columns]


def with_models(config: RewardConfig) -> RewardConfig:
    """The same scorer with the models that it loads by default written into its options, so that fetch sees them.

    A scorer of the user's own is left as it is: it may not be installed here.
    """
    if "." in config.type:
        return config
    return config.model_copy(update={"options": models_of(REWARDS.find(config.type, "type"), config.options)})


def models_of(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a class, with its defaults of those that name models; `models` of the class may add others."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    found = {name: defaults[name] for name in MODEL_KEYS if isinstance(defaults.get(name), str)} | dict(options)
    return kind.models(found) if hasattr(kind, "models") else found


def build_reward(config: RewardConfig, key: str, methods: Sequence[str] = METHODS) -> Any:
    """Build one scorer, whose config stands at ``key`` and whose class has one of ``methods``; raises as above."""
    kind, options = _resolve(config, key, methods)
    try:
        return kind(**options)
    except ConfigError as error:
        raise ConfigError(f"{key}.options of {config.type}: {error}") from error


def check_reward(
    config: RewardConfig, prompts: Sequence[Prompt], key: str, methods: Sequence[str] = METHODS
) -> list[tuple[Prompt, str]]:
    """Check one scorer, as `check_rewards` does all."""
    kind, options = _resolve(config, key, methods)
    check = getattr(kind, "check", None)
    try:
        return list(check(prompts, **options)) if check is not None else []
    except ConfigError as error:
        raise ConfigError(f"{key}.options of {config.type}: {error}") from error


def _resolve(config: RewardConfig, key: str, methods: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The scorer's class, and its options as its constructor wants them."""
    kind = REWARDS.find(config.type, f"{key}.type")
    if not callable(kind) or not any(callable(getattr(kind, name.partition("(")[0], None)) for name in methods):
        raise ConfigError(f"{key}.type = {config.type!r} is not a class with a method {' or '.join(methods)}")
    return kind, check_options(kind, config.type, config.options, f"{key}.options")


def check_options(kind: Any, name: str, options: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Options, which stand at ``key`` of a config, as the constructor of a class called ``name`` wants them.

    Raises:
        ConfigError: one is unknown, missing, or not what the type hint says; names it and the fix.
    """
    parameters = inspect.signature(kind).parameters
    try:
        hints = get_type_hints(kind.__init__, include_extras=True) if inspect.isclass(kind) else {}
    except NameError:
        hints = {}  # types that only a type checker imports: there is nothing to check by
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    allowed = [one for one, parameter in parameters.items() if parameter.kind in named]  # neither *args nor **kwargs
    free = False
    for one in (name for name, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD):
        # ``**options: Unpack[SomeTypedDict]`` names what it takes, all of it optional (PEP 692).
        more = (
            get_type_hints(get_args(hints[one])[0], include_extras=True) if get_origin(hints.get(one)) is Unpack else {}
        )
        allowed, hints, free = allowed + [*more], hints | more, not more
    listing = ", ".join(allowed) or "none"
    for one in options:
        if one not in allowed and not free:
            fix = "".join(f"did you mean {near!r}? " for near in difflib.get_close_matches(one, allowed, 1, 0.5))
            fix = f"{REVISION}; " if one == "revision" else fix
            raise ConfigError(f"{key}.{one} is no option of {name}; {fix}allowed: {listing}")
    for one in allowed:
        if one not in options and one in parameters and parameters[one].default is inspect.Parameter.empty:
            raise ConfigError(f"{key}.{one} is missing: {name} needs it; allowed: {listing}")
    return {one: _converted(value, hints.get(one, Any), f"{key}.{one}") for one, value in options.items()}


def _converted(value: Any, hint: Any, key: str) -> Any:
    """The value as the constructor's type hint wants it, for example a number for ``1e-3``, text to YAML."""
    try:
        return TypeAdapter[Any](hint).validate_python(value)
    except PydanticSchemaGenerationError:
        return value  # a type that pydantic does not know is left to the constructor
    except ValidationError as error:
        raise ConfigError(impossible(key, error.errors()[0])) from error
