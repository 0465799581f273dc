"""Signals that end a job. A scheduler or a terminal may send one to all processes at once; the driver alone acts on it.

Ray's own processes would die of them, before the driver could save anything. They override a signal that is ignored,
but not one that is blocked, and hand what is blocked down to the workers.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Processes that are started within never get one of `SIGNALS`, nor do theirs; this one gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """In a worker's main thread: where signals are blocked, ignore them instead; then `unblock_signals` is safe."""
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        for number in SIGNALS:
            signal.signal(number, _ignore)  # not SIG_IGN, which processes that it starts would inherit
            signal.siginterrupt(number, False)
        unblock_signals()


def unblock_signals() -> None:
    """In a thread of a worker that ignores signals: processes that it starts end on SIGTERM, like any others."""
    if signal.getsignal(signal.SIGTERM) is _ignore:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _ignore(number: int, frame: object) -> None:
    """Do nothing."""
