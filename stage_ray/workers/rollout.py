"""The rollout actor: requests in, groups out, tokens and pictures as separate objects."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stage_ray.config import RunConfig
from stage_ray.records import RolloutGroup, RolloutReceipt, RolloutRequest, WeightManifest
from stage_ray.workers.logs import redirect_output
from stage_ray.workers.metrics import WorkerMetrics
from stage_ray.workers.ranked import Ranked

if TYPE_CHECKING:
    from stage_ray.line import Line, Place
    from stage_ray.weights import Chunk


class RolloutWorker(Ranked):
    """One image engine, or one rank's share of it.

    Updates its weights between waves only, so every image has one policy version (promise 2).
    """

    _line: Line | None = None

    def __init__(self, name: str, run: RunConfig, log: str | None, rank: int = 0) -> None:
        """Load nothing yet: `begin` does."""
        redirect_output(log, "rollout")
        self._metrics = WorkerMetrics("rollout", name)
        self._name, self._run, self._rank = name, run, rank

    def begin(self, address: str = "") -> None:
        """Start the engine, or this rank's share of it after it has met the others at ``address``."""
        from stage_ray.engines import build_engine  # after the redirection: importing vLLM talks

        self._engine = build_engine(
            self._run.policy, self._run.rollout, worker=self._name, rank=self._rank, address=address
        )

    def generate(self, *requests: RolloutRequest) -> tuple[Any, ...]:
        """A receipt, then for each request its group (``images`` empty) and its pictures (uint8 [G, H, W, 3]).

        The learner never reads pictures and the driver reads neither: each object goes only where it is used. Of
        several ranks the first one answers; the others' objects are None.
        """
        start = time.perf_counter()
        self._metrics.begin(request.group_id for request in requests)
        groups = self._engine.generate(requests)
        seconds = time.perf_counter() - start
        self._metrics.done(groups if self._rank == 0 else (), version=self._engine.policy_version)
        receipt = RolloutReceipt(self._name, self._engine.policy_version, seconds, _problem(requests, groups))
        if self._rank > 0:
            return (receipt, *[None] * (2 * len(requests)))
        objects: list[Any] = [receipt]
        for group in groups:
            bare = np.empty((len(group.seeds), 0, 0, 3), np.uint8)
            objects += [replace(group, images=bare), group.images]
        return tuple(objects)

    def sleep(self) -> None:
        """Leave the GPU's memory to the learner until the next wave or version."""
        self._engine.sleep()

    def load_weights(self, manifest: WeightManifest, *chunks: Chunk) -> int:
        """Verify a version and take it; the version now served.

        Raises:
            WeightError: it does not verify; the old version stays.
        """
        from stage_ray.weights import unpack

        self._engine.load_weights(manifest.version, unpack(manifest, chunks), known_finite=True)
        return self._engine.policy_version

    def receive(self, manifest: WeightManifest, place: Place) -> str:
        """Take a version that the learner sends; why the old one stays, "" where it does not."""
        from stage_ray.line import Line, LineBroken
        from stage_ray.weights import WeightError

        self._line = self._line or Line()
        try:
            tensors = self._line.receive(place, manifest)
        except (LineBroken, WeightError) as error:
            return str(error)
        self._engine.load_weights(manifest.version, tensors, known_finite=True)
        return ""


def _problem(requests: Sequence[RolloutRequest], groups: Sequence[RolloutGroup]) -> str:
    """Why an engine's answer cannot be used, "" where it can. The driver, who asks, never sees the arrays."""
    for request, group in zip(requests, groups, strict=True):
        if group.group_id != request.group_id:
            return f"group {group.group_id} where {request.group_id} was asked for"
        for name in ("logprobs", "guided_logprobs", "entropy"):
            if not np.isfinite(getattr(group, name)).all():
                return f"group {group.group_id} has {name} that are not finite"
    return ""
