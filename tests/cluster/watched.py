"""A rollout worker that tests can follow, in a file of its own: its process imports no more of a test than this."""

from __future__ import annotations

import os
from pathlib import Path

from stage_ray.workers.rollout import RolloutWorker


class Watched(RolloutWorker):
    """Writes down what it is asked for."""

    def setup(self, address=""):
        self._note("setup")
        super().setup(address)

    def generate(self, *requests):
        self._note("generate")
        return super().generate(*requests)

    def sleep(self):
        self._note("sleep")
        super().sleep()

    def load_weights(self, manifest, *chunks):
        self._note("load")
        return super().load_weights(manifest, *chunks)

    def _note(self, what: str) -> None:
        with Path(os.environ["STAGE_RAY_TEST_CALLS"]).open("a") as file:
            file.write(f"{self._name} {what}\n")
