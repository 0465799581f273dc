"""Signals to the driver: the first lets the step finish and saves, the second leaves at once."""

from __future__ import annotations

import asyncio
import os
import signal
from types import TracebackType

from stage_ray.errors import Interrupted
from stage_ray.run.progress import Progress

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """While it lasts, SIGINT and SIGTERM set ``requested`` instead of tearing the run down in the middle of a step.

    Example:
        async with StopSignal(progress) as stop:
            if stop.requested:
                raise stop.error(step)
    """

    def __init__(self, progress: Progress) -> None:
        self.requested: int | None = None
        self._progress = progress

    def error(self, step: int) -> Interrupted:
        """What ends the run after it has saved ``step``."""
        assert self.requested is not None
        name = signal.Signals(self.requested).name
        return Interrupted(f"stopped by {name} after step {step}; go on with --resume", 128 + self.requested)

    async def __aenter__(self) -> StopSignal:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._heard, number)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.remove_signal_handler(number)

    def _heard(self, number: int) -> None:
        if self.requested is not None:
            os._exit(128 + number)  # the workers follow: Ray ends them when their driver is gone
        self.requested = number
        self._progress.note("stopping after this step and its checkpoint; a second signal leaves at once")
