"""Signals that end a job: what was trained is saved first; what can be repeated is stopped at once.

SIGHUP says that the connection was lost, SIGUSR1 and SIGUSR2 of schedulers such as Slurm that the time is nearly up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import psutil

from stage_ray.errors import Interrupted
from stage_ray.observability.progress import Progress
from stage_ray.signals import SIGNALS

T = TypeVar("T")


class StopSignal:
    """Within this context the first signal stops the run: in `steps` after the current step and its checkpoint,
    elsewhere (start, evaluation, export) at once.

    A second SIGINT ends the process at once. A second SIGTERM changes nothing: schedulers repeat it while they wait
    (Kubernetes sends one to a job that is deleted and one to its pod), and a save must survive that.
    """

    def __init__(self, progress: Progress, go_on: str = "go on with --resume") -> None:
        """``go_on``: how a user goes on, the end of the error's sentence."""
        self.requested: int | None = None
        self._go_on = go_on
        self._progress, self._saves = progress, False
        self._task: asyncio.Task[object] | None = None
        self._work: asyncio.Task[Any] | None = None
        self._numbers = _heeded()

    def error(self, step: int | None = None) -> Interrupted:
        """The error that ends the run, at once or after ``step``."""
        assert self.requested is not None
        return _interrupted(self.requested, "" if step is None else f" after step {step}", self._go_on)

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """Within, a signal only sets ``requested``: the training loop reads it after each step."""
        self._saves = True
        try:
            yield
        finally:
            self._saves = False
        if self.requested is not None:
            raise self.error()

    async def unless_requested(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What ``work`` returns; within `steps` a signal, also one that has come, cancels it: None."""
        self._work = asyncio.ensure_future(work)
        if self.requested is not None:
            self._work.cancel()
        try:
            return await self._work
        except asyncio.CancelledError:
            if self.requested is None:
                raise
            return None
        finally:
            self._work = None

    async def __aenter__(self) -> StopSignal:
        self._task = asyncio.current_task()
        for number in self._numbers:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number in self._numbers:
            asyncio.get_running_loop().remove_signal_handler(number)
        if isinstance(error, asyncio.CancelledError) and self.requested is not None:  # cancelled by `_on_signal`
            raise self.error() from None

    def _on_signal(self, number: int) -> None:
        if self.requested is None:
            self.requested = number
            when = "after this step and its checkpoint" if self._saves else "now"
            self._progress.note(f"stopping {when}; Ctrl-C leaves at once")
            if self._work is not None:
                self._work.cancel()
            if self._task is not None and not self._saves:
                self._task.cancel()
        elif number == signal.SIGINT:
            for process in psutil.Process().children(recursive=True):  # a Ray that this run started
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            os._exit(128 + number)


@contextlib.contextmanager
def stops_at_once(go_on: str) -> Iterator[None]:
    """Within this context the first signal raises `Interrupted`, without an event loop, which would see it late: an
    engine of this process holds the main thread for a whole batch. Of repeated ones only Ctrl-C disturbs the end.
    """
    first = 0

    def stop(number: int, frame: object) -> None:
        nonlocal first
        if first and number != signal.SIGINT:
            return
        first = first or number
        raise KeyboardInterrupt  # not an Exception: libraries would take that for a failure of their own

    before = {number: signal.signal(number, stop) for number in _heeded()}
    try:
        yield
    except KeyboardInterrupt:
        if not first:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if first:
        raise _interrupted(first, "", go_on)


def _heeded() -> list[signal.Signals]:
    """The signals that end a job here: a SIGHUP that is ignored, as `nohup` wants it, is none."""
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not nohup]


def _interrupted(number: int, when: str, go_on: str) -> Interrupted:
    return Interrupted(f"stopped by {signal.Signals(number).name}{when}; {go_on}", 128 + number)
