"""How the driver is told that its pod goes: by the chart's script, against real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deploy.charts import CHART, ray_cluster, render

SCRIPT = CHART / "files" / "stop_driver.py"
DRIVER = """
import os, signal, time
from pathlib import Path

said = []

def enter(phase, until):
    Path("phase.new").write_text(phase)
    os.replace("phase.new", "phase")
    while not until() and not Path(f"after-{phase}").exists():
        time.sleep(0.02)

enter("starting", lambda: False)  # Python's own answer to SIGTERM: it dies
signal.signal(signal.SIGTERM, lambda number, frame: said.append(number))
enter("training", lambda: said)
enter("saving", lambda: len(said) == 2)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
enter("reporting", lambda: False)
Path("report").write_text(str(len(said)))
raise SystemExit(143)
"""


@contextmanager
def driver(folder: Path, words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that answers SIGTERM as a run does (stage_ray/run/stop.py): saves, then no longer listens."""
    (folder / "stage_ray").mkdir()
    (folder / "stage_ray" / "__init__.py").touch()
    for name in ("stage-ray", "stage_ray/__main__.py"):
        (folder / name).write_text(DRIVER)
    process = subprocess.Popen([sys.executable, *words], cwd=folder)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(folder: Path, phase: str) -> None:
    end = time.monotonic() + 60
    while not (folder / "phase").exists() or (folder / "phase").read_text() != phase:
        assert time.monotonic() < end, f"never {phase}"
        time.sleep(0.02)


def pre_stop(process: subprocess.Popen[bytes], seconds: float = 60) -> subprocess.Popen[bytes]:
    """The script as the head's pod runs it, looking at one process and not at every run on this machine."""
    code = "import psutil, runpy, sys; m = runpy.run_path(sys.argv[1]); "
    code += f"print(m['stop']([psutil.Process(int(sys.argv[2]))], {seconds}))"
    return subprocess.Popen([sys.executable, "-c", code, str(SCRIPT), str(process.pid)], stdout=subprocess.PIPE)


def let(folder: Path, *phases: str) -> None:
    """These phases need not wait for anybody."""
    for phase in phases:
        (folder / f"after-{phase}").touch()


def left_in_peace(process: subprocess.Popen[bytes], done: subprocess.Popen[bytes], folder: Path) -> int:
    """How often the driver was told; it went when it was ready, and the script waited for that."""
    assert process.wait(60) == 143, "it went by itself, and not of a signal"
    assert done.communicate(timeout=60)[0].strip() == b"0"
    return int((folder / "report").read_text())


def test_the_head_is_not_gone_before_the_script_has_run():
    (container,) = ray_cluster(render({"drainSeconds": 90}))["headGroupSpec"]["template"]["spec"]["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["python", "/etc/stage-ray/stop_driver.py", "90"]


@pytest.mark.parametrize("words", [["stage-ray", "train"], ["-m", "stage_ray", "train"]], ids=" ".join)
def test_before_the_head_goes_the_driver_is_told_once_and_waited_for(words, tmp_path):
    let(tmp_path, "starting")
    with driver(tmp_path, words) as process:
        until(tmp_path, "training")
        done = pre_stop(process)
        until(tmp_path, "saving")
        time.sleep(1)  # the script looks again, and says nothing more
        let(tmp_path, "saving", "reporting")
        assert left_in_peace(process, done, tmp_path) == 1


def test_a_driver_that_saves_because_ray_has_stopped_it_hears_the_same_again(tmp_path):
    let(tmp_path, "starting", "reporting")
    with driver(tmp_path, ["stage-ray", "train"]) as process:
        until(tmp_path, "training")
        process.send_signal(signal.SIGTERM)  # KubeRay's StopJob, by way of Ray
        until(tmp_path, "saving")
        assert left_in_peace(process, pre_stop(process), tmp_path) == 2


@pytest.mark.parametrize("phase", ["starting", "reporting"])
def test_a_driver_that_would_die_of_a_signal_gets_none(phase, tmp_path):
    let(tmp_path, "starting" if phase == "reporting" else "reporting", "saving")
    with driver(tmp_path, ["stage-ray", "train"]) as process:
        if phase == "reporting":
            until(tmp_path, "training")
            process.send_signal(signal.SIGTERM)
        until(tmp_path, phase)
        done = pre_stop(process)
        time.sleep(1)
        assert process.poll() is None
        let(tmp_path, phase)
        assert left_in_peace(process, done, tmp_path) == 1, "one that starts is told as soon as it listens"


def test_the_script_waits_no_longer_than_it_may(tmp_path):
    with driver(tmp_path, ["stage-ray", "train"]) as process:
        until(tmp_path, "starting")
        assert pre_stop(process, seconds=1).communicate(timeout=60)[0].strip() == b"1"
        assert process.poll() is None
