"""A rollout worker that tests can follow, in a file of its own: its process imports no more of a test than this."""

from __future__ import annotations

import time
from pathlib import Path

from stage_ray.workers.rollout import RolloutWorker

SUCCESSORS_S = 120.0


class Watched(RolloutWorker):
    """Writes down what it is asked for. A successor draws nothing until the other one of two is there too."""

    def setup(self, address=""):
        self._note("setup")
        super().setup(address)

    def generate(self, *requests):
        self._note("generate")
        if "restart" in self._name:
            self._wait_for_both()
        return super().generate(*requests)

    def sleep(self):
        self._note("sleep")
        super().sleep()

    def load_weights(self, manifest, *chunks):
        self._note("load")
        return super().load_weights(manifest, *chunks)

    def _note(self, what: str) -> None:
        with self._calls.open("a") as file:
            file.write(f"{self._name} {what}\n")

    def _wait_for_both(self) -> None:
        """A run may be over before the slower of two successors has started: it goes on while there is one."""
        deadline = time.monotonic() + SUCCESSORS_S
        while len({line for line in self._calls.read_text().splitlines() if line.endswith("-restart-1 setup")}) < 2:
            assert time.monotonic() < deadline, "one worker was not replaced"
            time.sleep(0.05)

    @property
    def _calls(self) -> Path:
        return Path(self._run.run_dir).with_name("calls")
