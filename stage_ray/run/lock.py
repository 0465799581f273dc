"""One driver a run directory: a second one would cut the first one's ledger back and write over its checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from stage_ray.errors import ConfigError

log = logging.getLogger(__name__)

LOCK = ".lock"
RETRY_S = 0.5


@contextlib.contextmanager
def run_dir_lock(run_dir: Path, wait_s: float) -> Iterator[None]:
    """Hold a run directory against other drivers, on this machine or on others that share its storage.

    The system lets go of it when this process ends, however it ends. Storage that knows no locks is used without.

    Args:
        wait_s: seconds to wait for the driver that holds it, which may be saving before it leaves.

    Raises:
        ConfigError: another driver holds it; says which process of which machine.
    """
    with (run_dir / LOCK).open("a+", encoding="utf-8") as file:
        _take(file, run_dir, time.monotonic() + wait_s)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _take(file: IO[str], run_dir: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                raise ConfigError(
                    f"run_dir {run_dir} is in use by {file.read() or 'another run'}; let that end first, "
                    "or name another --run-dir"
                ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): let no second run write into it", run_dir, error)
            return
        time.sleep(RETRY_S)
