"""Where a path in a config leads: a file here, one of a hub, or ``package:MODULE/FILE`` for what a package ships."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from stage_ray.config.hub import HUB, PROMPT_FILES, cached, download, hub_uri, is_pinned
from stage_ray.errors import ConfigError

PACKAGE = "package:"


def resolve_path(location: str) -> Path:
    """Path of a file or directory that must exist; what begins with ``hf://`` is downloaded, or found in the cache.

    Raises:
        ConfigError: nothing is there.
    """
    if location.startswith(HUB) and (uri := hub_uri(location)) is not None:
        known = cached(uri, PROMPT_FILES) if is_pinned(uri) else None
        return known if known is not None and known.is_file() else download(uri, PROMPT_FILES, location)
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
