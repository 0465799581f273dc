"""Is this directory a whole checkpoint of the right kind? Asked before a library loads it, for a clear answer.

``key`` is always the config's key that leads to the directory, for messages: ``policy.path``, or a scorer's ``path``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stage_ray.config.hub import MODEL_FILES, cached, download, hub_uri, is_pinned
from stage_ray.config.paths import resolve_path
from stage_ray.errors import ConfigError
from stage_ray.files import sync_path

KEY = "policy.path"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
NOT_EXPORTED = (".safetensors", ".bin", ".pt", ".pth", ".md", ".gguf", ".h5", ".msgpack")
DEEPSEEK = "multi_modality"  # the layout of DeepSeek's own code, which transformers does not read


def local_checkpoint(path: str, model_type: str | Sequence[str], key: str = KEY) -> Path:
    """The directory that holds a checkpoint, checked; a hub id is downloaded to (or found in) the hub's cache first.

    ``path`` is a directory, ``package:MODULE/DIR``, or ``OWNER/NAME[@REVISION]`` of a hub. A policy's may be an
    adapter of peft, and then it is the base's directory that is given.

    Raises:
        ConfigError: a file is missing, unreadable or cut short, the checkpoint is of another model type, or the hub
            has no such model or cannot be reached.
    """
    path = base_location(path) if key == KEY else path
    uri = hub_uri(path)
    if uri is None:
        directory = resolve_path(path)
    else:  # what a branch or a tag means, the hub alone knows
        directory = (located(path) if is_pinned(uri) else None) or download(uri, MODEL_FILES, key)
    check_directory(directory, model_type, key)
    return directory


def located(path: str) -> Path | None:
    """The directory of a checkpoint that is on this machine, in the hub's cache too; None where it would be fetched.

    Raises:
        ConfigError: it looks like a path and nothing is there.
    """
    uri = hub_uri(path)
    if uri is None:
        return resolve_path(path)
    directory = cached(uri, MODEL_FILES)
    with suppress(ConfigError):  # the cache also keeps what was left of a download, or a config alone
        if directory is not None and all(file.is_file() for file in weight_files(directory)):
            return directory
    return None


def adapter_directory(path: str) -> Path | None:
    """The directory that a location means, where an adapter of peft lies there in place of a model; else None."""
    directory = None if hub_uri(path) is not None else resolve_path(path)
    return directory if directory is not None and (directory / ADAPTER).is_file() else None


def base_location(path: str) -> str:
    """What holds the whole model that a location means: itself, or the base that an adapter there names.

    Raises:
        ConfigError: nothing is there, or the adapter names no base, or one that is not there.
    """
    directory = adapter_directory(path)
    if directory is None:
        return path
    config = read_object(directory / ADAPTER)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    where = f"{KEY}: {directory / ADAPTER}: base_model_name_or_path = {base!r}"
    fix = "set it to the directory or the hub id of the model that the adapter was trained on"
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{where} names no base; {fix}")
    try:
        if adapter_directory(base) is not None:
            raise ConfigError("it holds an adapter itself")
        return f"{base}@{revision}" if revision and hub_uri(base) is not None and "@" not in base else base
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}; {fix}") from error


def check_directory(directory: Path, model_type: str | Sequence[str], key: str = KEY) -> None:
    """Check ``config.json`` and every weight file of a local checkpoint (headers and sizes only, nothing is loaded).

    Raises:
        ConfigError: as `local_checkpoint`.
    """
    if not directory.is_dir():
        raise ConfigError(f"{key}: {directory} is not a directory; give a Hugging Face model directory")
    if (directory / ADAPTER).is_file():
        base = read_object(directory / ADAPTER, key).get("base_model_name_or_path")
        raise ConfigError(
            f"{key}: {directory} holds a LoRA adapter ({ADAPTER}), which is applied from a directory of policy.path "
            f"alone; merge it into its base ({base}) with peft's merge_and_unload, save that, and give its directory"
        )
    found = read_object(directory / "config.json", key).get("model_type")
    allowed = [model_type] if isinstance(model_type, str) else model_type
    if found == DEEPSEEK and found not in allowed:
        raise ConfigError(
            f"{key}: {directory} is in the layout of DeepSeek's own code (model_type {found!r}), which transformers "
            "does not read; convert it with `stage-ray convert SOURCE OUT`, and name OUT here"
        )
    if found not in allowed:
        needs = "policy.family needs" if key == KEY else "it needs"
        raise ConfigError(f"{key}: {directory} holds a {found!r} model, but {needs} {' or '.join(map(repr, allowed))}")
    for file in weight_files(directory, key):
        if not file.is_file():
            raise ConfigError(f"{key}: {file} is missing, though {WEIGHTS_INDEX} names it; copy or download it again")
        try:
            with safe_open(file, framework="pt"):  # verifies the header against the file's size
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{key}: {file} is cut short or damaged ({error}); download it again") from error


def check_tensors(directory: Path, expected: Mapping[str, Iterable[int]], key: str = KEY) -> None:
    """Check that a checkpoint holds every tensor of a model in its size (headers only); more do no harm.

    Libraries read a tensor under its name or with the name of a part before it, so both are found.

    Raises:
        ConfigError: one is missing or has another shape; names the first.
    """
    stored = tensor_shapes(directory, ("",))
    by_end = {name.split(".", 1)[-1]: shape for name, shape in stored.items()}
    lacking = []
    for name, size in expected.items():
        shape = stored.get(name) or by_end.get(name) or stored.get(name.split(".", 1)[-1])
        if shape is None and name not in stored:
            lacking.append(name)
        elif shape is not None and shape != tuple(size):
            raise ConfigError(
                f"{key}: {directory}: tensor {name} is {list(shape)}, but config.json makes it {list(size)}; the two "
                "do not belong together: copy or download both again"
            )
    if lacking:
        raise ConfigError(
            f"{key}: {directory} lacks {len(lacking)} tensors, the first is {lacking[0]}; copy or download it again"
        )


def weight_files(directory: Path, key: str = KEY) -> list[Path]:
    """The safetensors files of a checkpoint, one or several: those that transformers reads, one file before shards.

    Raises:
        ConfigError: there are none.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / WEIGHTS_INDEX).is_file():
        shards = read_object(directory / WEIGHTS_INDEX, key).get("weight_map", {})
        return [directory / name for name in sorted(set(shards.values()))]  # a shard holds many tensors
    if pickled := next((name for name in PICKLED if (directory / name).is_file()), None):
        raise ConfigError(
            f"{key}: {directory} has its weights in {pickled} alone, a pickle, which may run code when it is read; "
            "load it with transformers where you trust it, and save_pretrained() writes safetensors"
        )
    raise ConfigError(f"{key}: {directory} has no {WEIGHTS}; the model directory is incomplete")


def read_tensors(directory: Path, prefixes: tuple[str, ...], key: str = KEY) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with one of ``prefixes``; nothing else is read.

    Raises:
        ConfigError: one holds values that are not finite; names it and its file.
    """
    found = {}
    for name, file, opened in _entries(directory, prefixes):
        found[name] = opened.get_tensor(name)
        check_finite(name, found[name], file, key)
    return found


def check_finite(name: str, tensor: Tensor, where: Path | str, key: str = KEY) -> None:
    """Raise a `ConfigError` where a weight that was loaded from ``where`` is NaN or infinite."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        count = int((~tensor.isfinite()).sum())
        raise ConfigError(
            f"{key}: {where}: tensor {name} holds {count} values that are not finite; take another checkpoint of it"
        )


def only_finite(tensors: Iterable[tuple[str, Tensor]], where: Path | str) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they come, each through `check_finite`."""
    for name, tensor in tensors:
        check_finite(name, tensor, where)
        yield name, tensor


def check_loaded(model: nn.Module, missing: Iterable[str], location: Path) -> None:
    """Raise a `ConfigError` where a checkpoint lacks tensors of the model loaded from it, or has any not finite.

    ``missing``: as transformers' loading report has them.
    """
    if lacking := sorted(missing):
        raise ConfigError(f"{KEY}: {location} lacks {len(lacking)} tensors, the first is {lacking[0]}")
    for _ in only_finite(model.named_parameters(), location):
        pass


def tensor_shapes(directory: Path, prefixes: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the same tensors, from the headers alone."""
    return {name: tuple(opened.get_slice(name).get_shape()) for name, _, opened in _entries(directory, prefixes)}


def link_weights(checkpoint: Path, directory: Path) -> None:
    """Links to a checkpoint's weight files, and their index if there are several, in another directory."""
    files = weight_files(checkpoint)
    for file in files + [checkpoint / WEIGHTS_INDEX] * (files != [checkpoint / WEIGHTS]):
        (directory / file.name).symlink_to(file.resolve())  # vLLM reads weights beside its own config.json


def export_checkpoint(
    source: Path,
    directory: Path,
    state: Mapping[str, Tensor],
    *,
    added: bool = False,
    tied: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint again with new values of some tensors; all else as it came, whole or not at all.

    Names, dtypes, shards, config, generation config and tokenizer are those of ``source``. A directory that is there
    already is replaced once the new one is whole.

    Args:
        state: new values by name.
        added: they are added to what ``source`` has, in float32.
        tied: further names of tensors in ``state``, to theirs. ``source`` stores a tied tensor under any of its names,
            or under several, and so does what is written.
        texts: new texts of files, by name.
        dtype: of the new values; None is that of ``source``.

    Raises:
        ValueError: ``source`` has no tensor of such a name and size.
    """
    new = dict(state) | {other: state[name] for other, name in (tied or {}).items() if name in state}
    weights, left = weight_files(source), set(state)
    with whole_directory(directory) as partial:
        for file in source.iterdir():
            if file.is_file() and file.suffix not in NOT_EXPORTED and (file.name != WEIGHTS_INDEX or len(weights) > 1):
                shutil.copyfile(file, partial / file.name)
        for file in weights:
            with safe_open(file, framework="pt") as opened:
                tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
            for name in tensors.keys() & new.keys():
                value, stored = new[name].detach(), tensors[name]
                if value.shape != stored.shape:
                    raise ValueError(f"{name} is {list(value.shape)}, and {list(stored.shape)} in {file}")
                value = stored.float() + value.cpu().float() if added else value
                tensors[name] = value.to("cpu", dtype or stored.dtype, copy=name not in state).contiguous()
                left.discard((tied or {}).get(name, name))
            save_file(tensors, partial / file.name, metadata=metadata)
        if left:
            raise ValueError(f"{source} has no tensor {min(left)!r}")
        for name, text in (texts or {}).items():
            (partial / name).write_text(text, encoding="utf-8")


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A new directory to write files into; it takes the place of ``directory`` once they are on disk, or not at all."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for path in (*partial.iterdir(), partial):
        sync_path(path)  # before it replaces another
    old = directory.with_name(f".{directory.name}.replaced")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(directory, old)
    os.rename(partial, directory)
    shutil.rmtree(old, ignore_errors=True)


def read_object(file: Path, key: str = KEY) -> dict[str, Any]:
    """A JSON object that a checkpoint must have.

    Raises:
        ConfigError: it is missing, or no JSON object.
    """
    if not file.is_file():
        raise ConfigError(f"{key}: {file.parent} has no {file.name}; give a Hugging Face model directory")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {file} is not readable JSON ({error}); copy or download it again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{key}: {file} holds no JSON object; copy or download it again")
    return data


def _entries(directory: Path, prefixes: tuple[str, ...]) -> Iterator[tuple[str, Path, Any]]:
    """Name, file and opened file of each tensor that is asked for."""
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name.startswith(prefixes):
                    yield name, file, opened
