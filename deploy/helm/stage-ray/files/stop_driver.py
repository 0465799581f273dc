"""Before the head's pod goes: SIGTERM to the driver, which finishes its step and saves, and wait for it.

Kubernetes itself signals only the pod's first process, and Ray kills a job's driver when it goes.
Usage: python stop_driver.py SECONDS
"""

import os
import signal
import sys

import psutil


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


def stop(processes, seconds):
    """SIGTERM to the drivers among some processes; the number of those that are still there after the wait."""
    drivers = []
    for process in processes:
        try:
            if is_driver(process.cmdline()):
                process.send_signal(signal.SIGTERM)
                drivers.append(process)
        except psutil.Error:
            continue  # gone, or not ours
    return len(psutil.wait_procs(drivers, timeout=seconds)[1])


if __name__ == "__main__":
    stop(psutil.process_iter(), float(sys.argv[1]))
