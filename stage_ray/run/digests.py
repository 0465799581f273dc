"""Digests of what a run reads, so that a run that goes on is known to go on with the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from stage_ray.config import RunConfig
from stage_ray.config.hub import hub_uri
from stage_ray.config.inputs import inputs, takes_model, takes_prompts
from stage_ray.config.paths import resolve_path
from stage_ray.errors import ConfigError
from stage_ray.files import digest

NOTED_BYTES = 2 * 2**30  # more take seconds to read


def digest_inputs(run: RunConfig, note: Callable[[str], None]) -> dict[str, str]:
    """xxh3-64 of the contents of prompts, models and scorers' files that lie here, by the config's keys.

    A model of a hub has none: its commit stands in the config. What only an evaluation reads may change, and has none.
    ``note`` hears of files that take long to read.
    """
    texts = {key: location for key, location in inputs(run).items() if not key.startswith("evaluation.")}
    found = {key: files for key, location in texts.items() if (files := _files(key, location))}
    different = {file for files in found.values() for file in files.values()}
    if (size := sum(file.stat().st_size for file in different)) > NOTED_BYTES:
        note(f"reading {size / 2**30:.1f} GiB of models and prompts, to know them again")
    with ThreadPoolExecutor() as threads:
        digests = dict(zip(different, threads.map(digest, different), strict=True))
    return {key: _combined({name: digests[file] for name, file in files.items()}) for key, files in found.items()}


def _files(key: str, location: str) -> dict[str, Path]:
    """The files that a value leads to, by their names below it; none for a plain text, a repository, or nothing.

    Of a directory neither hidden files nor model cards. A scorer's directory counts if its key says that it is a model:
    into another one the scorer may write.
    """
    prompts = takes_prompts(key)
    try:
        path = resolve_path(location) if prompts or hub_uri(location) is None else None
        if path is None or not os.access(path, os.R_OK):
            return {}
        if path.is_file():
            return {"": path}
        if not prompts and not takes_model(key):
            return {}
        below = {file.relative_to(path): file for file in sorted(path.glob("*.txt" if prompts else "**/*"))}
    except (ConfigError, OSError):  # what is missing is refused elsewhere
        return {}
    shown = {name: file for name, file in below.items() if not any(part.startswith(".") for part in name.parts)}
    return {str(name): file for name, file in shown.items() if file.is_file() and file.suffix != ".md"}


def _combined(digests: dict[str, str]) -> str:
    """One of several files; of a single one its own."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    return xxhash.xxh3_64_hexdigest("".join(f"{name}\0{found}\n" for name, found in digests.items()).encode())
