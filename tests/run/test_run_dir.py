"""Who may write into a run directory: a new run, or the same one that goes on, and one driver at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stage_ray.errors import ConfigError
from stage_ray.run import run_dir as room
from stage_ray.run.run_dir import open_run_dir
from tests.runs import tiny_run

HOLDER = """
import sys, time
from pathlib import Path
from stage_ray.run.run_dir import run_dir_lock
with run_dir_lock(Path(sys.argv[1]), 0):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    return tiny_run(tmp_path, tmp_path / "janus")


@pytest.fixture
def trained(run):
    """A directory in which a run has done a step."""
    with open_run_dir(run, resume=False) as directory:
        (directory / "metrics.jsonl").write_text('{"step": 1}\n')
    return directory


@pytest.fixture
def other(trained):
    """Another driver, which holds that directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(trained)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def opened(run, resume) -> Path:
    with open_run_dir(run, resume) as directory:
        return directory


def test_a_run_is_not_written_over(run, trained):
    with pytest.raises(ConfigError, match="already holds a run; add --resume to go on with it"):
        opened(run, resume=False)
    assert opened(run, resume=True) == opened(run, resume="auto") == trained


def test_resuming_with_another_learning_rate_names_the_key(tmp_path, trained):
    with pytest.raises(ConfigError, match="--resume: learner was"):
        opened(tiny_run(tmp_path, tmp_path / "janus", learner={"lr": 1.0}), resume=True)


def test_resuming_where_there_is_no_run_is_refused_unless_it_may_begin_one(tmp_path, run):
    with pytest.raises(ConfigError, match="holds no run; leave --resume out to begin one, or use --auto-resume"):
        opened(run, resume=True)
    assert not (tmp_path / "run").exists()
    assert opened(run, resume="auto") == tmp_path / "run"


def test_a_directory_of_something_else_is_left_as_it_is(tmp_path, run):
    thesis = tmp_path / "run" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        opened(run, resume="auto")
    assert list(thesis.parent.iterdir()) == [thesis]


def test_a_run_that_another_driver_holds_is_refused_and_the_driver_named(run, trained, other):
    before = (trained / "config.yaml").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=f"in use by process {other.pid} on .*; let that end first"):
        opened(run, resume=True)
    assert (trained / "config.yaml").stat().st_mtime_ns == before


def test_a_driver_that_was_killed_holds_nothing(run, trained, other):
    other.kill()
    other.wait()
    assert opened(run, resume=True) == trained
    assert (trained / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_storage_that_knows_no_locks_is_used_with_a_warning(run, trained, monkeypatch, caplog):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert opened(run, resume=True) == trained
    assert f"{trained} cannot be locked" in caplog.text and "let no second run write into it" in caplog.text


def test_a_job_that_is_started_again_waits_for_the_one_before_it_to_leave(run, trained, other, monkeypatch):
    with pytest.raises(ConfigError, match="in use by"):
        monkeypatch.setattr(room, "RETRY_WAIT_S", 0.7)
        opened(run, resume="auto")
    monkeypatch.setattr(room, "RETRY_WAIT_S", 30.0)
    threading.Timer(0.7, other.send_signal, [signal.SIGKILL]).start()
    assert opened(run, resume="auto") == trained
