"""Chatter of a worker process (Ray's, vLLM's, torch's) goes to a file of its own in the run directory."""

from __future__ import annotations

import os
from pathlib import Path

from stage_ray.files import deny_others_writing
from stage_ray.observability.logs import start_worker_logs


def redirect_output(log: str | None, role: str = "worker", worker: str = "worker") -> None:
    """Send this process's stdout and stderr, C++ included, to a file; None leaves them to Ray's own log files.

    Args:
        log: the file; it need not exist.
        role: rollout, reward or learner.
        worker: what the driver and the metrics call this worker; its lines carry that name.

    Every actor begins with this, so it is also where nobody else may write the files of a run any more: a worker of a
    cluster that the run joined has that cluster's umask.
    """
    deny_others_writing()
    if log is not None:
        path = Path(log)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    start_worker_logs(role, worker)
