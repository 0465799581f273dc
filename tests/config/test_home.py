"""Users without a home, or with one that is closed, and a user id that no password file knows."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stage_ray.config.home import ensure_home

CACHES = ("HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_HOME")


@pytest.fixture
def private(monkeypatch) -> Iterator[Path]:
    """The directory that stands in for a home; the variables that matter are back afterwards."""
    for name in ("USER", "HOME", *CACHES):
        monkeypatch.setenv(name, "")  # so that it is remembered
        monkeypatch.delenv(name)
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # pytest's own are too long
        monkeypatch.setenv("RAY_TMPDIR", directory)
        yield Path(directory) / f"stage-ray-{os.getuid()}" / "home"


@pytest.mark.parametrize("home", [None, "/dev/null/home", "/nonexistent"])
def test_without_a_home_there_is_one_of_our_own(private, monkeypatch, caplog, home):
    if home:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("os.path.expanduser", lambda path: home or path)  # the user is in no password file
    ensure_home()
    assert os.environ["HOME"] == str(private) and private.stat().st_mode & 0o777 == 0o700
    assert f"the home directory {home or '~'} cannot be written (set HOME): caches go to {private}" in caplog.text
    assert not os.environ.keys() & set(CACHES)


def test_a_closed_home_is_read_and_caches_go_elsewhere(private, monkeypatch, tmp_path):
    home = tmp_path / "closed"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != home)
    monkeypatch.setenv("TRITON_HOME", "/mine")
    ensure_home()
    found = [os.environ.get(name) for name in ("HOME", *CACHES)]
    assert found == [str(home), f"{home}/.cache/huggingface", str(private), str(private), "/mine"]


def test_a_home_that_can_be_written_stays_as_it_is(private, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    ensure_home()
    assert os.environ["HOME"] == str(tmp_path) and not private.exists() and not os.environ.keys() & set(CACHES)


@pytest.mark.parametrize("error", [KeyError("uid not found"), OSError("No username set in the environment")])
def test_a_user_id_that_has_no_name_gets_one(private, monkeypatch, tmp_path, error):
    def unknown() -> str:
        raise error

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(getpass, "getuser", unknown)
    ensure_home()
    assert os.environ["USER"] == f"uid-{os.getuid()}"
