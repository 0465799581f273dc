"""Files are whole or not at all, also on file systems without all that a local disk has."""

from __future__ import annotations

import errno
import os

import pytest

from stage_ray.files import atomic_write, flush_to_disk


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
