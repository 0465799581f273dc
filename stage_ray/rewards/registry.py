"""From a config's ``rewards`` to scorers: names, dotted paths, and options checked before anything is loaded."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.registry import Registry
from stage_ray.rewards.base import Reward

REWARDS = Registry("stage_ray.rewards", "Reward", "scorer")


def build_rewards(configs: Sequence[RewardConfig]) -> list[tuple[str, Reward]]:
    """Build every scorer of a run, with the name of its column.

    Raises:
        ConfigError: an unknown scorer, or options that its constructor does not take; names the key and the mend.

    Example:
        build_rewards([RewardConfig(type="geneval", options={"detector": "my_package.MyDetector"})])
    """
    return [(config.column, _build(config, f"rewards.{index}")) for index, config in enumerate(configs)]


def _build(config: RewardConfig, key: str) -> Reward:
    kind = REWARDS.find(config.type, f"{key}.type")
    if not callable(kind) or not callable(getattr(kind, "score", None)):
        raise ConfigError(f"{key}.type = {config.type!r} is not a class with a method score(images, prompts)")
    _check_names(kind, config, f"{key}.options")
    hints = _hints(kind)
    options = {
        name: _converted(value, hints[name], f"{key}.options.{name}") if name in hints else value
        for name, value in config.options.items()
    }
    try:
        return kind(**options)
    except ConfigError as error:
        raise ConfigError(f"{key}.options of {config.type}: {error}") from error


def _check_names(kind: Any, config: RewardConfig, key: str) -> None:
    parameters = inspect.signature(kind).parameters
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    allowed = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    listing = ", ".join(allowed) or "none"
    for name in config.options:
        if name not in allowed and not free:
            near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"{key}.{name} is no option of {config.type}; {mend}allowed: {listing}")
    for name in allowed:
        if name not in config.options and parameters[name].default is inspect.Parameter.empty:
            raise ConfigError(f"{key}.{name} is missing: {config.type} needs it; allowed: {listing}")


def _hints(kind: Any) -> dict[str, Any]:
    try:
        return get_type_hints(kind.__init__, include_extras=True) if inspect.isclass(kind) else {}
    except NameError:
        return {}  # names that only a type checker imports: nothing to check by


def _converted(value: Any, hint: Any, key: str) -> Any:
    """The value as the constructor's type hint wants it, for example a number for ``1e-3``, text to YAML."""
    try:
        adapter = TypeAdapter[Any](hint)
    except PydanticSchemaGenerationError:
        return value  # a type that pydantic knows nothing of: the constructor will see to it
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ConfigError(f"{key} = {value!r}: {problem[0].lower()}{problem[1:]}") from error
