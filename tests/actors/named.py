"""A bare worker for tests of pools. A file of its own: what else a test imports, its processes need not load."""

from __future__ import annotations

import os
import signal

from stage_ray.actors.client import Worker


class Named(Worker):
    """Answers with its name, or dies."""

    def __init__(self, name: str) -> None:
        self._name = name

    def name(self) -> str:
        return self._name

    def pid(self) -> int:
        return os.getpid()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
