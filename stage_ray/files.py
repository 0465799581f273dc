"""Files that are written whole or not at all (promise 7), and who may write them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from stage_ray.errors import ConfigError, RunError

SOCKET_BYTES = 107  # longest path of a Unix socket
LONGEST_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # below a private directory
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


@dataclass(frozen=True, slots=True)
class FileDigest:
    """The size of a file and the xxh3-64 of its bytes, in hexadecimal."""

    bytes: int
    xxh3: str


@contextlib.contextmanager
def name_disk_errors(directory: Path, go_on: str = "go on with --resume") -> Iterator[None]:
    """Turn the error of a full or broken disk, from any file, into one sentence, which ends with how to ``go_on``.

    Raises:
        RunError: names the directory and what the system said.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise RunError(f"{directory} cannot be written any more ({error}); fix that and {go_on}") from error


def deny_others_writing() -> None:
    """Take the right to write from group and others, for all that this process and its children create from now on."""
    os.umask(os.umask(0o077) | 0o022)


def private_directory() -> Path:
    """A directory of this user alone, for sockets of Ray's sessions and what has no better place; made if missing.

    It is in RAY_TMPDIR, else in TMPDIR, and where that cannot be used in /tmp, as Python's own temporary files are.

    Raises:
        ConfigError: the place that RAY_TMPDIR names cannot be used, or none of the others can; says why.
    """
    named = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    problems = []
    for name in [named] if named in ("RAY_TMPDIR", "") else [named, ""]:  # the variable, or none
        place = Path(os.environ[name] if name else "/tmp").absolute()
        directory = place / f"stage-ray-{os.getuid()}"
        over = len(os.fsencode(directory)) + len(LONGEST_SOCKET) - SOCKET_BYTES
        try:
            if over > 0:
                raise OSError(f"{over} bytes too long, as a socket's path has at most {SOCKET_BYTES}")
            directory.mkdir(mode=0o700, parents=name == "RAY_TMPDIR", exist_ok=True)
            if directory.is_symlink() or directory.stat().st_uid != os.getuid():
                raise OSError(f"{directory} belongs to another user")
            keep_private(directory)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise OSError("not writable")
            return directory
        except OSError as error:
            problems.append(f"{f'{name} = ' if name else ''}{str(place)!r} ({error.strerror or error})")
    raise ConfigError(f"{' and '.join(problems)} cannot hold Ray's sockets; set RAY_TMPDIR to a short path of yours")


def keep_private(path: Path) -> None:
    """Take all rights from group and others."""
    if (mode := path.stat().st_mode) & 0o077:
        path.chmod(mode & 0o700)


def atomic_write(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name, flush it to disk, then rename: readers see the old file or the new one.

    The directory is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        flush_to_disk(file.fileno())
    scratch.replace(path)


def require_writable(path: Path, option: str) -> None:
    """Raise a `ConfigError` where nothing can be written to a path, long before it is; ``option`` leads to it."""
    place = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "may not be written to" if place.is_dir() else "is no directory"
        raise ConfigError(f"{option} {path} cannot be written: {place} {why}; name another")


def digest(path: Path) -> str:
    """xxh3-64 of what a file holds, or of the files of a directory in the order of their names; hexadecimal."""
    found = xxhash.xxh3_64()
    for file in sorted(path.glob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                while block := stream.read(2**24):
                    found.update(block)
    return found.hexdigest()


def flush_to_disk(descriptor: int) -> None:
    """``fsync``, where the file system has it: some network file systems refuse it and are as safe as they are."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def sync_path(path: Path) -> None:
    """Flush a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if there is no file.

    Raises:
        RunError: the file is damaged; names it.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not readable JSON ({error}); remove it to go on without it") from error
