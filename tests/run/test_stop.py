"""What signals that end a job do to a driver: real ones, to a small process that stops as a run does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from stage_ray.errors import Interrupted
from stage_ray.observability.progress import Progress
from stage_ray.run.stop import StopSignal
from stage_ray.signals import SIGNALS, blocked_signals

DRIVER = """
import asyncio, subprocess, sys
from stage_ray.errors import Interrupted
from stage_ray.observability.progress import Progress
from stage_ray.run.stop import StopSignal

async def run(place, seconds):
    async with StopSignal(Progress()) as stop:
        print(subprocess.Popen(["sleep", "60"], stdout=-3).pid, flush=True)  # stands for a Ray that the run started
        if place == "start":
            await asyncio.sleep(60)
        with stop.steps():
            for step in range(1000):
                await asyncio.sleep(seconds)  # an update, and the checkpoint after it
                print("saved", flush=True)
                if stop.requested is not None:
                    raise stop.error(step)

try:
    asyncio.run(run(sys.argv[1], float(sys.argv[2])))
except Interrupted as stopped:
    print(stopped)
    sys.exit(stopped.exit_code)
"""


@pytest.fixture
def driver():
    """Starts the small driver; its process, and that of its child."""
    started = []

    def start(place: str, hangup=signal.SIG_DFL, seconds: float = 0.5) -> tuple[subprocess.Popen, psutil.Process]:
        command = [sys.executable, "-c", DRIVER, place, str(seconds)]
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


def left(process: subprocess.Popen) -> list[str]:
    """What it said until it ended, but for what it tells the person who watches."""
    said, _ = process.communicate(timeout=60)
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
    process, child = driver("steps", seconds=60)
    process.send_signal(first)
    assert process.stdout.readline().startswith("[")  # it says what comes: one signal at a time, else they are one
    process.send_signal(signal.SIGINT)
    assert left(process) == [] and process.returncode == 128 + signal.SIGINT
    deadline = time.monotonic() + 60  # a killed process may take a moment to go
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


WORKER = """
import signal, subprocess, sys, threading
from stage_ray.signals import ignore_signals, unblock_signals
print("started", flush=True)
sys.stdin.readline()
ignore_signals()

def work():  # a worker's main thread only waits
    unblock_signals()
    scorer = subprocess.Popen(["sleep", "60"])
    scorer.terminate()
    print(scorer.wait(), flush=True)

thread = threading.Thread(target=work)
thread.start()
thread.join()
sys.stdin.readline()
"""


def test_a_worker_hears_no_signal_from_its_start_on_but_its_own_processes_do():
    with blocked_signals():
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
    with worker:
        for said in ("started\n", f"{-signal.SIGTERM}\n"):  # blocked; then ignored
            assert worker.stdout.readline() == said
            for number in SIGNALS:
                worker.send_signal(number)
            worker.stdin.write("go on\n")
    assert worker.returncode == 0


def test_a_signal_between_two_steps_cancels_what_need_not_be_finished():
    found: list[object] = []

    async def scenario() -> None:
        async with StopSignal(Progress()) as stop:
            with stop.steps():
                found.append(await stop.unless_requested(asyncio.sleep(0, "done")))
                asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGUSR1)
                found.append(await stop.unless_requested(asyncio.Event().wait()))
                found.append(await stop.unless_requested(asyncio.sleep(0, "done")))  # it has come before

    with pytest.raises(Interrupted):
        asyncio.run(scenario())
    assert found == ["done", None, None]
