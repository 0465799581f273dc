"""Is this directory a whole checkpoint of the right family? Asked before a library loads it, for a clear answer."""

from __future__ import annotations

import json
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
            raise ConfigError(
                f"policy.path: {path} is no directory here and was not found on the hub: {_first_line(error)}"
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
        _check_weight_file(file)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or several.

    Raises:
        ConfigError: there are none.
    """
    if (directory / WEIGHTS_INDEX).is_file():
        shards = _read_json(directory / WEIGHTS_INDEX).get("weight_map", {})
        return [directory / name for name in sorted(set(shards.values()))]
    if not (directory / WEIGHTS).is_file():
        raise ConfigError(f"policy.path: {directory} has no {WEIGHTS}; the model directory is incomplete")
    return [directory / WEIGHTS]


def read_tensors(directory: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with ``prefix``, which is cut off; nothing else is read."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors.update({name[len(prefix) :]: opened.get_tensor(name) for name in names})
    return tensors


def tensor_shapes(directory: Path, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the same tensors, from the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
            shapes.update({name[len(prefix) :]: tuple(opened.get_slice(name).get_shape()) for name in names})
    return shapes


def _check_weight_file(file: Path) -> None:
    if not file.is_file():
        raise ConfigError(f"policy.path: {file} is missing, though {WEIGHTS_INDEX} names it; copy or download it again")
    try:
        with safe_open(file, framework="pt"):  # verifies the header against the file's size
            pass
    except SafetensorError as error:
        raise ConfigError(f"policy.path: {file} is cut short or damaged ({error}); download it again") from error


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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
