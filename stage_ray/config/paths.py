"""Where a path in a config leads: a file, a hub id, or ``package:MODULE/FILE`` for what a package ships."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from stage_ray.errors import ConfigError

PACKAGE = "package:"


def resolve_path(location: str) -> Path:
    """Path of a file or directory that must exist.

    Raises:
        ConfigError: nothing is there.
    """
    if location.startswith(PACKAGE):
        module, _, rest = location[len(PACKAGE) :].partition("/")
        try:
            path = Path(str(importlib.resources.files(module))) / rest
        except ModuleNotFoundError as error:
            raise ConfigError(f"{location}: there is no package {module!r}") from error
    else:
        path = Path(location).expanduser()
    if not path.exists():
        raise ConfigError(f"{location} does not exist")
    return path


def require_lasting(location: str | Path | None, called: str) -> None:
    """Raise a `ConfigError` where results would be lost: relative to where Ray unpacks a job's files, until it ends."""
    path = Path(location or "/")
    if not path.is_absolute() and "/working_dir_files/" in f"{path.resolve()}/":
        raise ConfigError(
            f"{called} = {str(path)!r} is relative: it would lie in this Ray job's temporary directory and be lost "
            "with it; name shared storage, such as /shared/runs/first"
        )


def model_location(location: str) -> str:
    """What ``from_pretrained`` takes: an existing directory, or a hub id as it is.

    Raises:
        ConfigError: it looks like a path (``package:``, ``/``, ``./``, ``~``) and nothing is there.
    """
    looks_like_path = location.startswith((PACKAGE, "/", ".", "~")) or location.count("/") != 1
    return str(resolve_path(location)) if looks_like_path or Path(location).exists() else location
