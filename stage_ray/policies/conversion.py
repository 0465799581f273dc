"""Checkpoints in a layout that transformers does not read, converted shard by shard: ``stage-ray convert``.

A family says what its layout is (`Layout`); finding, verifying, streaming and resuming are the same for all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # the name of an error; nothing is unpickled but tensors
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.serialization import safe_globals

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError, RunError
from stage_ray.files import atomic_write, digest, name_disk_errors, read_json, sync_path
from stage_ray.policies import family_of, policy_class
from stage_ray.pretrained import ADAPTER, PICKLED, WEIGHTS, WEIGHTS_INDEX, check_finite, read_object
from stage_ray.registry import Registry

LAYOUTS = Registry("stage_ray.policies", "Layout", "layout")
KEY = "SOURCE"
SOURCE_FILES = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.model")  # what is downloaded of a source
RECORD = "progress.json"
SHARD_BYTES = 2 * 10**9  # of one file in OUT, so that a source in a single file needs no more memory than this
AGAIN = "give the same command again, which keeps the shards that are written"


class Layout(ABC):
    """How a family's weights are published where that is not transformers' layout.

    The family's ``__init__`` imports its subclass, named ``<Name>Layout``; that import must stay cheap.

    Attributes:
        title: whose layout this is, for messages.
        files: those that hold the weights.
    """

    title: ClassVar[str]
    files: list[Path]

    @staticmethod
    @abstractmethod
    def matches(source: Path, config: Mapping[str, Any]) -> bool:
        """Whether a source with this ``config.json``, empty where there is none, is in this layout."""

    @abstractmethod
    def __init__(self, source: Path, config: Mapping[str, Any], template: str, files: Sequence[str] = ()) -> None:
        """Read all but the weights.

        Args:
            template: a config's ``policy.template``.
            files: names of the files to take of a source that holds several models; none are all of them.

        Raises:
            ConfigError: a file or a key is missing, or says what the family cannot be.
        """

    @abstractmethod
    def expected(self) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        """Shapes of the tensors in transformers' model by name, and the names that are tied to others of them."""

    @abstractmethod
    def convert(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What a tensor of the source is in transformers' model, by name; nothing where that needs none of it.

        Called with every tensor on the meta device first, also with unknown names and wrong shapes: those are kept,
        and refused by the caller.
        """

    @abstractmethod
    def write_files(self, directory: Path, dtype: torch.dtype) -> None:
        """Write configs, tokenizer and processor beside the weights, most of which are ``dtype``."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to be written: its name, the source's file and tensors, their new names, and its size."""

    name: str
    source: Path
    tensors: tuple[str, ...]
    new_names: tuple[str, ...]
    bytes: int


def convert_checkpoint(
    source: Path,
    out: Path,
    *,
    template: str,
    dtype: torch.dtype | None,
    bar: Callable[[str, int], AbstractContextManager[Callable[[], None]]],
    files: Sequence[str] = (),
) -> None:
    """Write a checkpoint that plain transformers loads, whole or not at all.

    Files are written to ``.<OUT>.partial`` beside OUT, which is renamed in the end. If that is cut off, the next call
    keeps every shard whose checksum is the one recorded. Memory: one shard, at most about `SHARD_BYTES`.

    Args:
        dtype: of all floating-point tensors; None keeps each as it is.
        bar: makes a progress bar of a description and a total, and yields what advances it.
        files: as `Layout` takes them.

    Raises:
        ConfigError: the source is incomplete, damaged or of another layout, or OUT exists.
        RunError: the disk is full or cannot be written.
    """
    if out.exists():
        raise ConfigError(f"OUT: {out} exists already; name another directory, or remove it")
    family, layout = find_layout(source, template, files)
    shards, main_dtype = _planned(_verified(source, layout), dtype)
    partial = out.with_name(f".{out.name}.partial")
    identity = [f"{dtype}", *(f"{s.name} {s.source.name} {s.source.stat().st_mtime_ns} {s.bytes}" for s in shards)]
    with name_disk_errors(out, AGAIN):
        done = _kept(partial, identity)
        needed, free = sum(s.bytes for s in shards if s.name not in done), shutil.disk_usage(partial).free
        if needed > free:
            raise RunError(f"{out} needs {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free; {AGAIN}")
        with bar("converting shards", len(shards)) as advance:
            for shard in shards:
                if shard.name not in done:
                    _write(shard, layout, partial, dtype)
                    done[shard.name] = digest(partial / shard.name)
                    atomic_write(partial / RECORD, json.dumps({"identity": identity, "done": done}))
                advance()
        layout.write_files(partial, main_dtype)
        if len(shards) > 1:
            weight_map = {new: shard.name for shard in shards for new in shard.new_names}
            index = {"metadata": {"total_size": sum(s.bytes for s in shards)}, "weight_map": weight_map}
            atomic_write(partial / WEIGHTS_INDEX, json.dumps(index, indent=2, sort_keys=True))
        written = PolicyConfig(family=family, path=str(partial))
        policy_class(written).check(written)
        (partial / RECORD).unlink()
        for path in (*partial.iterdir(), partial):
            sync_path(path)
        os.rename(partial, out)


def find_layout(source: Path, template: str, files: Sequence[str] = ()) -> tuple[str, Layout]:
    """The family whose layout a directory is in, and the layout of its files.

    Raises:
        ConfigError: no family knows it, or it is in transformers' layout already.
    """
    if not source.is_dir():
        raise ConfigError(f"{KEY}: {source} is not a directory; give one that holds config.json and weights")
    if (source / ADAPTER).is_file():
        raise ConfigError(f"{KEY}: {source} holds a LoRA adapter ({ADAPTER}); merge it into its base first")
    if missing := [name for name in files if not (source / name).is_file()]:
        raise ConfigError(f"{KEY}: {source} holds no {missing[0]}, which --file names")
    config = read_object(source / "config.json", KEY) if (source / "config.json").is_file() else {}
    known = {family: LAYOUTS.find(family, KEY) for family in LAYOUTS.names()}
    for family, layout in known.items():
        if layout.matches(source, config):
            return family, layout(source, config, template, files)
    if family_of(source, KEY) is not None:
        raise ConfigError(f"{KEY}: {source} is in transformers' layout already; name it in policy.path as it is")
    found, titles = config.get("model_type"), ", ".join(f"{layout.title} ({name})" for name, layout in known.items())
    raise ConfigError(f"{KEY}: {source} holds a {found!r} model; layouts that are converted: {titles}")


def source_files(source: Path) -> list[Path]:
    """Files that hold the weights: safetensors before PyTorch's own, a single file before shards.

    Raises:
        ConfigError: there are none, or one that an index names is missing.
    """
    for whole, index in ((WEIGHTS, WEIGHTS_INDEX), PICKLED):
        if (source / whole).is_file():
            return [source / whole]
        if (source / index).is_file():
            names = sorted(set(read_object(source / index, KEY).get("weight_map", {}).values()))
            if missing := [name for name in names if not (source / name).is_file()]:
                raise ConfigError(f"{KEY}: {source / missing[0]} is missing, though {index} names it; download it")
            return [source / name for name in names]
    if found := sorted(source.glob("*.safetensors")) or sorted(source.glob("*.pt")):
        return found
    raise ConfigError(f"{KEY}: {source} holds no weights (.safetensors, pytorch_model.bin or .pt)")


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a file by name, mapped into memory and not read yet; of a pickle nothing but tensors is taken.

    Raises:
        ConfigError: it is damaged, or holds more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with safe_globals([Namespace]):  # a trainer's arguments: plain values, which are not read
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        why = str(error).strip().split("\n")[0]
        raise ConfigError(f"{KEY}: {file} is cut short or damaged ({why}); download it again") from error
    except UnpicklingError as error:
        raise ConfigError(f"{KEY}: {file} holds more than tensors, which is not unpickled; save them alone") from error
    if isinstance(found, dict):
        inner = [found[key] for key in ("state_dict", "model", "module", "ema") if isinstance(found.get(key), dict)]
        tensors = inner[0] if inner else found
        if tensors and all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            return dict(tensors)
    raise ConfigError(f"{KEY}: {file} holds no tensors by name; give a file that torch.save wrote of a state_dict")


def _verified(source: Path, layout: Layout) -> Iterator[tuple[Path, str, dict[str, Tensor]]]:
    """File, name and pieces (on the meta device) of every tensor that is needed; no values are read.

    Raises:
        ConfigError: a tensor is missing, unexpected, stored twice or of another shape; names the first.
    """
    expected, tied = layout.expected()
    found: set[str] = set()
    for file in layout.files:
        for name, tensor in read_weights(file).items():
            where = f"{KEY}: {file}: tensor {name}"
            pieces = layout.convert(name, tensor.to("meta"))
            for new, piece in pieces.items():
                if new not in expected:
                    raise ConfigError(f"{where} has no place in the model that config.json describes")
                if (shape := list(piece.shape)) != list(expected[new]):
                    raise ConfigError(
                        f"{where} makes {new} {shape}, but config.json makes it {list(expected[new])}; the two do not "
                        "belong together: copy or download both again"
                    )
                if new in found:
                    raise ConfigError(f"{where} is stored in another file too; remove one of them")
                found.add(new)
            if pieces:
                yield file, name, pieces
    if lacking := sorted(expected.keys() - found - tied):
        raise ConfigError(
            f"{KEY}: {source} lacks {len(lacking)} tensors, the first is what becomes {lacking[0]}; copy or download "
            "it again"
        )


def _planned(
    tensors: Iterable[tuple[Path, str, dict[str, Tensor]]], dtype: torch.dtype | None
) -> tuple[list[Shard], torch.dtype]:
    """The files to write, each from one file of the source, and the dtype that most values will have."""
    chunks: list[tuple[Path, list[str], list[str], int]] = []  # a `Shard` without its name, which needs their count
    counts: Counter[torch.dtype] = Counter()
    for file, name, pieces in tensors:
        size = sum(piece.numel() * _target(piece, dtype).itemsize for piece in pieces.values())
        counts.update({_target(piece, dtype): piece.numel() for piece in pieces.values()})
        if not chunks or chunks[-1][0] != file or chunks[-1][3] + size > SHARD_BYTES:
            chunks.append((file, [], [], 0))
        _, names, new_names, before = chunks[-1]
        chunks[-1] = (file, [*names, name], [*new_names, *pieces], before + size)
    total = len(chunks)
    shards = [
        Shard(
            WEIGHTS if total == 1 else f"model-{n:05}-of-{total:05}.safetensors", file, tuple(names), tuple(news), size
        )
        for n, (file, names, news, size) in enumerate(chunks, 1)
    ]
    return shards, counts.most_common(1)[0][0]


def _target(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _kept(partial: Path, identity: Sequence[str]) -> dict[str, str]:
    """Checksums of the shards that an earlier call wrote of the same source, verified; all else is removed."""
    record = read_json(partial / RECORD) or {}
    done = record.get("done", {}) if record.get("identity") == list(identity) else {}
    done = {n: found for n, found in done.items() if (partial / n).is_file() and digest(partial / n) == found}
    partial.mkdir(parents=True, exist_ok=True)
    for path in partial.iterdir():
        if path.name not in done:
            path.unlink()
    return done


def _write(shard: Shard, layout: Layout, directory: Path, dtype: torch.dtype | None) -> None:
    """Write one shard whole: under a temporary name, flushed, then renamed."""
    scratch = directory / f"{shard.name}.tmp"
    try:
        save_file(dict(_pieces(shard, layout, dtype)), scratch, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of an OSError
        raise RunError(f"{directory} cannot be written any more ({error}); fix that and {AGAIN}") from error
    sync_path(scratch)
    scratch.replace(directory / shard.name)


def _pieces(shard: Shard, layout: Layout, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    stored = read_weights(shard.source)
    for name in shard.tensors:
        check_finite(name, stored[name], shard.source, KEY)
        for new, piece in layout.convert(name, stored[name]).items():
            yield new, piece.to(_target(piece, dtype)).contiguous()
