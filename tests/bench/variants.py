"""Variants that measure nothing, in a module that imports nothing heavy: a process of each starts at once."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from stage_ray.bench.base import Trials
from stage_ray.bench.gpu_check.base import Figures, Setting, SkippedError, require


def logging_variant(log: str, name: str) -> Trials:
    """Writes its name, process and threads in each trial."""
    for number in itertools.count(1):
        with Path(log).open("a") as file:
            file.write(f"{name} {os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")
        yield {"seconds": float(number)}


def failing_variant(log: str, name: str) -> Trials:
    """Does not even load."""
    if name:
        raise ValueError(f"{name} has\nno legs")
    yield {}


def dying_variant(log: str, name: str) -> Trials:
    """Loads, then ends."""
    while True:
        os._exit(7)
        yield {}


def a_check(setting: Setting, figures: Figures, how: str) -> None:
    """A check that ends in the way it is told to."""
    figures["legs"] = 3.0
    if how == "skips":
        raise SkippedError("no second leg here")
    if how == "dies":
        os._exit(7)
    if how == "hangs":
        time.sleep(1000)
    require(how != "fails", f"lame on {setting.device}")
