"""Chatter of a worker process (Ray's, vLLM's, torch's) goes to a file of its own in the run directory."""

from __future__ import annotations

import os
from pathlib import Path


def redirect_output(log: str | None) -> None:
    """Send this process's stdout and stderr, C++ included, to a file; None leaves them to Ray's own log files."""
    if log is None:
        return
    path = Path(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
