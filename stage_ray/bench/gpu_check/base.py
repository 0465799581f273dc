"""The frame: each check has a process of its own and a time limit, so that one which fails or hangs stops no other.

Imports neither torch nor vLLM: a check's process does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from stage_ray.config.hardware import usable_cpus
from stage_ray.errors import RunError
from stage_ray.observability.logs import redirect_output

Figures = dict[str, float]
"""What a check measured, by names that carry their units; it fills them in as it goes: they outlive a failure."""
CLOSE_S = 10.0  # what a process may take to end after its answer


@dataclass(frozen=True, slots=True)
class Setting:
    """What every check is told."""

    device: str  # cpu or cuda
    small: bool  # small shapes, to see that the checks themselves work
    scratch: Path  # a directory for models, runs and checkpoints, removed at the end


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must work: ``work(setting, figures, **options)``, a function of a module, raises where not."""

    name: str
    work: Callable[..., None]
    limit_s: float
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a check; ``reason`` says why it failed or was skipped."""

    name: str
    state: Literal["ok", "failed", "skipped"]
    seconds: float
    figures: Figures
    reason: str = ""


class SkippedError(Exception):
    """A check cannot be made on this machine; the text says why."""


def require(good: bool, otherwise: str) -> None:
    """Raise a RunError unless what a check is about holds."""
    if not good:
        raise RunError(otherwise)


def run_check(check: Check, setting: Setting, limit_s: float) -> Outcome:
    """Run one check in a fresh process, for at most ``limit_s``; whatever it started ends with it."""
    log = setting.scratch / "logs" / f"{check.name.replace('/', '-')}.log"
    spawn = multiprocessing.get_context("spawn")
    pipe, other_end = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_serve, args=(other_end, check, setting, str(log)))
    start = time.monotonic()
    process.start()
    other_end.close()
    try:
        if pipe.poll(max(0.0, limit_s)):
            state, figures, reason = pipe.recv()
            process.join(CLOSE_S)
        else:
            state, figures, reason = "failed", {}, f"took longer than {limit_s:.0f} s"
    except EOFError:
        process.join(CLOSE_S)
        state, figures, reason = "failed", {}, f"its process ended with exit code {process.exitcode}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # its children too, such as a run's
        process.kill()  # before it had a group of its own
        process.join()
    if state == "failed" and log.is_file():
        reason += _last_lines(log)
    return Outcome(check.name, state, time.monotonic() - start, figures, reason)


def _last_lines(log: Path, count: int = 12) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    return "".join(f"\n    {line}" for line in lines)


def _serve(pipe: Connection, check: Check, setting: Setting, log: str) -> None:
    """In the new process, which leads a group of its own: run the check and send what became of it."""
    os.setsid()
    # Before torch comes: OpenMP reads its variable when it is loaded.
    os.environ.update(OMP_NUM_THREADS=str(usable_cpus()), TOKENIZERS_PARALLELISM="false")
    redirect_output(log)
    figures: Figures = {}
    try:
        check.work(setting, figures, **check.options)
        pipe.send(("ok", figures, ""))
    except SkippedError as skipped:
        pipe.send(("skipped", figures, str(skipped)))
    except Exception as error:  # as text: the other process may not unpickle it
        pipe.send(("failed", figures, f"{type(error).__name__}: {' '.join(str(error).split())}"))
        raise
