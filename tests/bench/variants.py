"""Variants that measure nothing, in a module that imports nothing heavy: a process of each starts at once."""

from __future__ import annotations

import os
from pathlib import Path

from stage_ray.bench.base import Trial


def logging_variant(log: str, name: str) -> Trial:
    """Writes its name, process and threads in each trial."""
    state = {"trials": 0}

    def trial() -> dict[str, float]:
        state["trials"] += 1
        with Path(log).open("a") as file:
            file.write(f"{name} {os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")
        return {"seconds": float(state["trials"])}

    return trial


def failing_variant(log: str, name: str) -> Trial:
    """Does not even load."""
    raise ValueError(f"{name} has\nno legs")


def dying_variant(log: str, name: str) -> Trial:
    """Loads, then ends."""

    def trial() -> dict[str, float]:
        os._exit(7)

    return trial
