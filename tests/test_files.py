"""Files are whole or not at all, also on file systems without all that a local disk has."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stage_ray.errors import ConfigError
from stage_ray.files import atomic_write, flush_to_disk, private_directory


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_is_no_failure(tmp_path, monkeypatch, number):
    def refuses(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuses)
    atomic_write(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_a_disk_that_fails_is_one(monkeypatch):
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        flush_to_disk(1)


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's, as pytest's own do not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


def test_a_private_directory_is_where_the_variables_say(short, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(short / "t"))
    monkeypatch.setenv("RAY_TMPDIR", str(short / "r"))  # made, as Ray does
    name = f"stage-ray-{os.getuid()}"
    assert private_directory() == short / "r" / name
    assert private_directory().stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("RAY_TMPDIR")
    (short / "t").mkdir()
    assert private_directory() == short / "t" / name


@pytest.mark.parametrize("kind", ["long", "missing", "file"])
def test_a_tmpdir_that_cannot_hold_sockets_is_passed_over_and_a_ray_tmpdir_refused(short, monkeypatch, kind):
    place = short / {"long": 60 * "x", "missing": "missing/x", "file": "file"}[kind]
    if kind == "long":
        place.mkdir()
    else:
        (short / "file").touch()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(place))
    assert private_directory() == Path(f"/tmp/stage-ray-{os.getuid()}")
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    if kind == "missing":
        assert private_directory().parent == place
        return
    why = "bytes too long, as a socket's path has at most 107" if kind == "long" else "Not a directory"
    with pytest.raises(ConfigError, match=rf"RAY_TMPDIR = '{place}' \(.*{why}\) cannot hold Ray's sockets; set RAY_"):
        private_directory()


def test_a_private_directory_of_another_user_is_refused(short, monkeypatch):
    (short / f"stage-ray-{os.getuid()}").symlink_to("/usr")
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    with pytest.raises(ConfigError, match="belongs to another user"):
        private_directory()
