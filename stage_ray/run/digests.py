"""Digests of what a run reads, so that a run that goes on is known to go on with the same."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from stage_ray.config import RunConfig
from stage_ray.config.hub import hub_uri
from stage_ray.config.inputs import inputs, takes_model
from stage_ray.config.paths import resolve_path
from stage_ray.errors import ConfigError

NOTED_BYTES = 2 * 2**30  # more take seconds to read


def digest_inputs(run: RunConfig, note: Callable[[str], None]) -> dict[str, str]:
    """xxh3-64 of the contents of prompts, models and scorers' files that lie here, by the config's keys.

    A model of a hub has none: its commit stands in the config. ``note`` hears of files that take long to read.
    """
    found: dict[str, tuple[Path, list[Path]]] = {}
    for key, location in inputs(run).items():
        prompts = key.startswith("prompts.")
        with contextlib.suppress(
            ConfigError, OSError
        ):  # most options are no paths; what is missing is refused elsewhere
            if prompts or hub_uri(location) is None:
                path = resolve_path(location)
                if (
                    prompts or path.is_file() or takes_model(key)
                ):  # another directory may be one that a scorer writes to
                    found[key] = (path, _files(path, "*.txt" if prompts else "**/*"))
    different = {file for _, files in found.values() for file in files}
    if (size := sum(file.stat().st_size for file in different)) > NOTED_BYTES:
        note(f"reading {size / 2**30:.1f} GiB of models and prompts, to know them again")
    with ThreadPoolExecutor() as threads:
        digests = dict(zip(different, threads.map(_digest, different), strict=True))
    return {
        key: _combined({str(file.relative_to(path)): digests[file] for file in files})
        for key, (path, files) in found.items()
    }


def _files(path: Path, pattern: str) -> list[Path]:
    """A file itself; of a directory, those that match and are neither hidden nor a model card."""
    if path.is_file():
        return [path]
    files = [file for file in path.glob(pattern) if file.is_file() and file.suffix != ".md"]
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts))


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, xxhash.xxh3_64).hexdigest()


def _combined(digests: dict[str, str]) -> str:
    """One of several files; of a single one its own."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    return xxhash.xxh3_64("".join(f"{name}\0{digest}\n" for name, digest in digests.items()).encode()).hexdigest()
