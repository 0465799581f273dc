"""What Ray leaves on this machine: the directory of a session, with logs and what was spilled from memory.

A run locks its session for as long as it lives, and the system frees the lock however it ends. So the next run can tell
which sessions of ours are over, and removes them. Those of other clusters have no such lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from pathlib import Path
from typing import IO


def lock_session(session: Path) -> IO[str]:
    """Mark a session as that of a living run of ours, until the file that is returned is closed."""
    file = session.with_name(f"{session.name}.lock").open("w", encoding="utf-8")
    with contextlib.suppress(OSError):  # a file system without locks: it is never removed
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def remove_dead_sessions(directory: Path) -> None:
    """Remove the sessions below ``directory`` whose runs have ended."""
    for lock in directory.glob("session_*.lock"):
        with contextlib.suppress(OSError), lock.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where its run lives
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            if not lock.with_suffix("").exists():  # a worker may outlive its run by a moment
                lock.unlink()
