"""A home for users without one, as in a container whose user id no password file knows: libraries' caches need it."""

from __future__ import annotations

import getpass
import logging
import os
from pathlib import Path

from stage_ray.files import private_directory

log = logging.getLogger(__name__)


def ensure_home() -> None:
    """Where the home directory is missing or closed, let libraries keep their caches in another one, and say so.

    Models that Hugging Face has cached in a closed one are still found. Raises as `private_directory`.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"
    given = Path(os.path.expanduser("~"))  # "~" itself where nothing says what it is
    if given.is_dir() and os.access(given, os.W_OK | os.X_OK):
        os.environ.setdefault("HOME", str(given))  # Ray and others look nowhere else
        return
    home = private_directory() / "home"
    home.mkdir(mode=0o700, exist_ok=True)
    log.warning("the home directory %s cannot be written (set HOME): caches go to %s", given, home)
    if not given.is_dir():
        os.environ["HOME"] = str(home)
        return
    if os.path.isdir(models := f"{given}/.cache/huggingface"):
        os.environ.setdefault("HF_HOME", models)
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_HOME"):
        os.environ.setdefault(name, str(home))
