"""A config from its file: YAML, dotted overrides, and errors that name the key, the value and the fix."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from inspect import isclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from stage_ray.config import RunConfig
from stage_ray.config.paths import PACKAGE, resolve_path
from stage_ray.config.sections import FORMS
from stage_ray.config.shipped import config_path
from stage_ray.errors import ConfigError, impossible, suggest

RENAMED = {"rollout.images_per_wave": "rollout.images_per_batch"}  # key of an earlier version -> today's, for its error
REVISION = "a revision stands behind the name of a repository: OWNER/NAME@REVISION"


def load_config(
    config: str | Path, overrides: Sequence[str] | None = None, run_dir: str | Path | None = None
) -> RunConfig:
    """Read a YAML config, apply ``KEY=VALUE`` overrides (values are YAML) and validate.

    It is a file, or the name of a config that ships with stage_ray. It may begin with ``base: FILE``, another config
    beside it or ``package:MODULE/FILE``: what it says goes on top, section by section.

    Raises:
        ConfigError: missing or unreadable file, unknown key, impossible value; names the nearest right one.

    Example:
        load_config("stage_shapeworld", ["learner.lr=1e-5", "rewards.0.weight=2"], run_dir="runs/slow")
    """
    path, data = config_path(config), dict[str, Any]()
    for file in reversed(config_files(path)):
        data = _merged(data, read_mapping(file, str(file), " of keys to values"))
    data.pop("base", None)
    if run_dir is not None:
        overrides = [*(overrides or []), f"run_dir={json.dumps(str(run_dir))}"]
    return validate_config(data, overrides, source=str(path))


def config_files(config: str | Path) -> list[Path]:
    """A config, its base, the base's base, and so on.

    Raises:
        ConfigError: one is missing or unreadable, or a base is based on what it is the base of.
    """
    found = [config_path(config)]
    while True:
        if not found[-1].is_file():
            raise ConfigError(f"config file {found[-1]}, the base of {found[-2]}, does not exist")
        base = read_mapping(found[-1], str(found[-1]), " of keys to values").get("base")
        if base is None:
            return found
        if not isinstance(base, str):
            raise ConfigError(
                f"{found[-1]}: base = {base!r} must be the name of a config beside it, or package:MODULE/FILE"
            )
        found.append(resolve_path(base) if base.startswith(PACKAGE) else found[-1].parent / base)
        if found[-1].resolve() in [file.resolve() for file in found[:-1]]:
            raise ConfigError(f"{found[-2]}: base = {base!r} is based on it in turn")


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two mappings, the second on top: sections are merged, values and lists replaced."""
    both = {
        key: _merged(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }
    return below | both


def read_mapping(path: Path, what: str, known: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; ``what`` names the file in errors, ``known`` ends the one of another value.

    Raises:
        ConfigError: it is missing, no YAML or no mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{what} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{what} holds no mapping{known}")
    return data


def validate_config(data: dict[str, Any], overrides: Sequence[str] | None = None, source: str = "config") -> RunConfig:
    """Apply ``KEY=VALUE`` overrides to plain data and validate; raises a `ConfigError` as `load_config` does."""
    for override in overrides or []:
        _apply_override(data, override)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(explain(item) for item in error.errors())) from error


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"--set {override!r} is not KEY=VALUE, for example learner.lr=1e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: {text!r} is not a YAML value") from error
    node: Any = data
    *parents, last = key.split(".")
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else _item(node, part, key)
    if isinstance(node, list):
        _item(node, last, key)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {override!r}: {'.'.join(parents)} is a value, not a section")


def _item(node: Any, part: str, key: str) -> Any:
    if not isinstance(node, list) or not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--set {key}: there is no {part!r} here; lists are indexed from 0, as in rewards.0.weight")
    return node[int(part)]


def explain(item: Any, model: type[BaseModel] = RunConfig) -> str:
    """One of a `ValidationError`'s errors in a sentence that names the key, and the nearest right one."""
    *parents, last = location = [str(part) for part in item["loc"] if part not in FORMS] or ["config"]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        nearest = suggest(last, _fields_at(parents, model), "".join(f"{part}." for part in parents))
        renamed = f"it is called {RENAMED[key]!r} now" if key in RENAMED else ""
        return f"unknown key {key!r}: {renamed or (REVISION if last == 'revision' else nearest)}"
    if item["type"] == "missing":
        return f"{key} is missing"
    return str(item["ctx"]["error"]) if item["type"] == "value_error" else impossible(key, item)


def _fields_at(location: list[str], model: type[BaseModel]) -> list[str]:
    """Names that are allowed in the section at a location; positions of lists and keys of mappings are skipped."""
    for part in location:
        if part in model.model_fields:
            model = next(_sections(model.model_fields[part].annotation))
    return list(model.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """A section itself, or the sections of a list, or of either."""
    if isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
