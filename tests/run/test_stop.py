"""What signals that end a job do to a driver: real ones, to a small process that stops as a run does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

DRIVER = """
import asyncio, subprocess, sys
from stage_ray.errors import Interrupted
from stage_ray.observability.progress import Progress
from stage_ray.run.stop import StopSignal

async def run(place):
    async with StopSignal(Progress()) as stop:
        print(subprocess.Popen(["sleep", "60"], stdout=-3).pid, flush=True)  # stands for a Ray that the run started
        if place == "start":
            await asyncio.sleep(60)
        with stop.steps():
            for step in range(1000):
                await asyncio.sleep(1.0)  # an update, and the checkpoint after it
                print("saved", flush=True)
                if stop.requested is not None:
                    raise stop.error(step)

try:
    asyncio.run(run(sys.argv[1]))
except Interrupted as stopped:
    print(stopped)
    sys.exit(stopped.exit_code)
"""


@pytest.fixture
def driver():
    """Starts the small driver; its process, and that of its child."""
    started = []

    def start(place: str, hangup=signal.SIG_DFL) -> tuple[subprocess.Popen, psutil.Process]:
        command = [sys.executable, "-c", DRIVER, place]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup),  # these tests too may run under nohup
        )
        child = psutil.Process(int(process.stdout.readline()))
        started.extend([process, child])
        return process, child

    yield start
    for process in started:
        process.kill()


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


def left(process: subprocess.Popen) -> list[str]:
    """What it said until it ended, but for what it tells the person who watches."""
    said, _ = process.communicate(timeout=10)
    return [line for line in said.splitlines() if not line.startswith("[")]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_lets_a_step_finish_and_save(driver, number):
    process, _ = driver("steps")
    process.send_signal(number)
    assert left(process) == ["saved", f"stopped by {number.name} after step 0; go on with --resume"]
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_at_once_what_can_be_repeated(driver, number):
    process, _ = driver("start")
    process.send_signal(number)
    assert left(process) == [f"stopped by {number.name}; go on with --resume"]
    assert process.returncode == 128 + number


def test_under_nohup_a_lost_connection_changes_nothing(driver):
    process, _ = driver("steps", hangup=signal.SIG_IGN)
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGUSR1)
    said = left(process)
    assert said[-1].startswith("stopped by SIGUSR1 after step")


def test_a_scheduler_that_repeats_itself_does_not_cut_a_save_short(driver):
    process, _ = driver("steps")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert left(process)[0] == "saved"
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_another_signal_leaves_at_once_and_takes_everything_along(driver, first):
    process, child = driver("steps")
    process.send_signal(first)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert left(process) == [] and process.returncode == 128 + signal.SIGINT
    deadline = time.monotonic() + 10  # a killed process may take a moment to go
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
