"""What a command shows while it works: a live display on a terminal, a few plain lines elsewhere, or log lines."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from stage_ray.config import RunConfig
from stage_ray.observability.logs import bind_context, start_logs

log = logging.getLogger(__name__)
PLAIN_EVERY_S = 10.0
PLAIN_EVERY_STEPS = 10
PLAIN_EVERY_SHARE = 0.05  # of the time a bar has taken: hours of work are a few dozen lines
SHOWN = {  # metric -> how a person reads it
    "reward/mean": "reward {:.3f}",
    "kl": "KL {:.4f}",
    "entropy/policy": "entropy {:.3f}",
    "images_per_s": "{:.1f} images/s",
}


class LastingConsole(Console):
    """A console whose work goes on when nobody reads it any more (``| head``, a closed terminal)."""

    def on_broken_pipe(self) -> None:
        """Say so on stderr and write to nowhere from here on; Rich itself would end the process."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        self.quiet = True
        with contextlib.suppress(OSError):
            print("stage-ray: nobody reads stdout any more; the work goes on without it", file=sys.stderr, flush=True)


class Progress:
    """Shows stages, steps, bars, notes and alarms; picks live or plain by whether the console is a terminal.

    Nothing is drawn before the first call, and leaving a ``with`` restores the terminal; the last state stays on it.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or LastingConsole(highlight=False, soft_wrap=True)
        self._start = time.monotonic()
        count = (BarColumn(bar_width=28), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn())
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), *count)
        self._bars = Bars(*columns, console=self.console, speed_estimate_period=3600)
        self._training = self._bars.add_task("training", visible=False)
        self._stage = self._bars.add_task("", total=None, visible=False)
        self._numbers = Text(style="cyan")
        self._live = Live(Group(self._bars, self._numbers), console=self.console, refresh_per_second=8)
        self._printed = (float("-inf"), -PLAIN_EVERY_STEPS)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.update(self._stage, visible=False)
        self._live.stop()

    def stage(self, text: str) -> None:
        """Name what happens now; replaces the stage before it."""
        if self.console.is_terminal:
            self._live.start()
            self._bars.update(self._stage, description=text, visible=True)
        else:
            self.note(f"{text} ...")

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """One update is done: ``step`` of ``total``, with the metrics of the run's ``metrics.jsonl``."""
        numbers = "  ".join(form.format(metrics[name]) for name, form in SHOWN.items() if metrics.get(name) is not None)
        now = time.monotonic()
        self._bars.update(self._training, completed=step, total=total, visible=True)
        if self.console.is_terminal:
            self._live.start()
            self._bars.update(self._stage, visible=False)
            self._numbers.plain = f"  {numbers}"
        elif now - self._printed[0] >= PLAIN_EVERY_S or step - self._printed[1] >= PLAIN_EVERY_STEPS or step >= total:
            self._printed = (now, step)
            seconds = self._bars.tasks[0].time_remaining  # None after a single step, 0 after the last one
            self.note(f"step {step}/{total}  {numbers}" + (f"  ETA {_clock(seconds)}" if seconds else ""))

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[..., None]]:
        """A sub-task of ``total`` units; yields ``advance(units=1)``."""
        started = printed = time.monotonic()
        done = 0

        def advance(units: int = 1) -> None:
            nonlocal done, printed
            done += units
            self._bars.advance(task, units)
            now = time.monotonic()
            due = now - printed >= max(PLAIN_EVERY_S, PLAIN_EVERY_SHARE * (now - started))
            if not self.console.is_terminal and done < total and due:
                printed = now
                seconds = self._bars.tasks[self._bars.task_ids.index(task)].time_remaining
                self.note(f"{description}: {done} of {total}" + (f"  ETA {_clock(seconds)}" if seconds else ""))

        if self.console.is_terminal:
            self._live.start()
            self._bars.update(self._stage, visible=False)
        else:
            self.note(f"{description} ({total}) ...")
        task = self._bars.add_task(description, total=total)
        try:
            yield advance
        finally:
            self._bars.remove_task(task)
        self.note(f"{description}: done in {_clock(time.monotonic() - started)}")

    def note(self, text: str, style: str | None = None) -> None:
        """A line that stays."""
        self.console.print(f"[{_clock(time.monotonic() - self._start)}] {text}", style=style, markup=False)

    def alarm(self, name: str, text: str) -> None:
        """A line that stays and cannot be missed."""
        self.note(f"ALARM {name}: {text}", style="bold red")


class LoggedProgress(Progress):
    """The same as lines of the log, for ``logs.format: json``: every step, with its numbers in ``metrics``."""

    def __init__(self) -> None:
        super().__init__(Console(force_terminal=False))

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """One line a step."""
        bind_context(step=step)
        shown = {name: metrics.get(name) for name in SHOWN}
        finite = {name: it for name, it in shown.items() if it is not None and math.isfinite(it)}  # JSON has no NaN
        log.info("step %d of %d", step, total, extra={"metrics": finite})

    def alarm(self, name: str, text: str) -> None:
        """A warning with the alarm's name in ``alarm``."""
        bind_context()
        log.warning(text, extra={"alarm": name})

    def note(self, text: str, style: str | None = None) -> None:
        """One line, without the time: every line of the log has one."""
        bind_context()
        log.info(text)


def progress_for(run: RunConfig) -> Progress:
    """The progress of a run, as its ``logs.format`` wants it; from here on Python's logging is that too."""
    start_logs(run.logs.format, Path(run.run_dir).name)
    return LoggedProgress() if run.logs.format == "json" else Progress()


def _clock(seconds: float) -> str:
    """Seconds as 1:05 or 2:03:04."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
