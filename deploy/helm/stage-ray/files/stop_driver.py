"""Before the head's pod goes: SIGTERM to the driver, which finishes its step and saves, and wait for it.

Kubernetes itself signals only the pod's first process, and Ray kills a job's driver when it goes. Where the whole job
is deleted, KubeRay has told Ray to stop it, and this is the second SIGTERM: a driver takes it as the same order, unless
it no longer listens, since it has saved and writes its report. Then it is waited for and left in peace.
Usage: python stop_driver.py SECONDS
"""

import os
import signal
import sys
import time

import psutil

LOOK_S = 0.5
"""So often a driver that does not listen yet, because it starts, is looked at again."""


def is_driver(command):
    """Whether a command line is `stage-ray train` or `python -m stage_ray train`, and not the shell around it.

    Example:
        >>> is_driver(["/usr/bin/python3", "/usr/bin/stage-ray", "train", "config.yaml"])
        True
        >>> is_driver(["/bin/sh", "-c", "stage-ray train config.yaml"])
        False
    """
    script = [os.path.basename(word) for word in command[1:3]]
    return script == ["stage-ray", "train"] or command[1:4] == ["-m", "stage_ray", "train"]


def listens(process):
    """Whether a process handles SIGTERM; another one would die of it."""
    with open(f"/proc/{process.pid}/status", encoding="ascii", errors="replace") as status:
        (caught,) = [line.split()[1] for line in status if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def drivers_among(processes):
    """Those that are drivers, are alive and can be asked."""
    found = []
    for process in processes:
        try:
            if is_driver(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue  # gone, or not ours
    return found


def stop(processes, seconds):
    """Tell the drivers among some processes, once each, and wait; the number of those that are still there after it."""
    drivers = drivers_among(processes)
    told = set()
    end = time.monotonic() + seconds
    while drivers and time.monotonic() < end:
        for driver in drivers:
            try:
                if driver.pid not in told and listens(driver):
                    driver.send_signal(signal.SIGTERM)
                    told.add(driver.pid)
            except (psutil.Error, OSError):
                continue  # gone between two looks
        drivers = psutil.wait_procs(drivers, timeout=LOOK_S)[1]
    return len(drivers)


if __name__ == "__main__":
    stop(psutil.process_iter(), float(sys.argv[1]))
