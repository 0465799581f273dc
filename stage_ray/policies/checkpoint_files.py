"""Is this directory a whole checkpoint of the right family? Asked before a library loads it, for a clear answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stage_ray.config.paths import model_location
from stage_ray.errors import ConfigError

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def local_checkpoint(path: str, model_type: str) -> Path:
    """The directory that holds a checkpoint, checked; a hub id is downloaded to (or found in) the hub's cache first.

    Raises:
        ConfigError: a file is missing, unreadable or cut short, the checkpoint is of another model type, or the hub
            has no such model or cannot be reached.
    """
    location = model_location(path)
    if not Path(location).exists():
        try:
            location = snapshot_download(location, allow_patterns=HUB_FILES)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ConfigError(
                f"policy.path: {path} is no directory here and was not found on the hub: {reason}"
            ) from error
    check_directory(Path(location), model_type)
    return Path(location)


def check_directory(directory: Path, model_type: str) -> None:
    """Check ``config.json`` and every weight file of a local checkpoint (headers and sizes only, nothing is loaded).

    Raises:
        ConfigError: as `local_checkpoint`.
    """
    if not directory.is_dir():
        raise ConfigError(f"policy.path: {directory} is not a directory; give a Hugging Face model directory")
    found = _read_json(directory / "config.json").get("model_type")
    if found != model_type:
        raise ConfigError(f"policy.path: {directory} holds a {found!r} model, but policy.family needs {model_type!r}")
    for file in weight_files(directory):
        if not file.is_file():
            raise ConfigError(
                f"policy.path: {file} is missing, though {WEIGHTS_INDEX} names it; copy or download it again"
            )
        try:
            with safe_open(file, framework="pt"):  # verifies the header against the file's size
                pass
        except SafetensorError as error:
            raise ConfigError(f"policy.path: {file} is cut short or damaged ({error}); download it again") from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or several.

    Raises:
        ConfigError: there are none.
    """
    if (directory / WEIGHTS_INDEX).is_file():
        shards = _read_json(directory / WEIGHTS_INDEX).get("weight_map", {})
        return [directory / name for name in sorted(set(shards.values()))]  # a shard holds many tensors
    if not (directory / WEIGHTS).is_file():
        raise ConfigError(f"policy.path: {directory} has no {WEIGHTS}; the model directory is incomplete")
    return [directory / WEIGHTS]


def read_tensors(directory: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with one of ``prefixes``; nothing else is read."""
    return {name: file.get_tensor(name) for name, file in _entries(directory, prefixes)}


def tensor_shapes(directory: Path, prefixes: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the same tensors, from the headers alone."""
    return {name: tuple(file.get_slice(name).get_shape()) for name, file in _entries(directory, prefixes)}


def link_weights(checkpoint: Path, directory: Path) -> None:
    """Links to a checkpoint's weight files, and their index if there are several, in another directory."""
    index = [checkpoint / WEIGHTS_INDEX] if (checkpoint / WEIGHTS_INDEX).is_file() else []
    for file in weight_files(checkpoint) + index:
        (directory / file.name).symlink_to(file.resolve())  # vLLM reads weights beside its own config.json


def _entries(directory: Path, prefixes: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Name and opened file of each tensor that is asked for."""
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name.startswith(prefixes):
                    yield name, opened


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"policy.path: {file.parent} has no {file.name}; give a Hugging Face model directory")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"policy.path: {file} is not readable JSON ({error}); copy or download it again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"policy.path: {file} holds no JSON object; copy or download it again")
    return data
