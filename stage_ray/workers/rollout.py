"""The rollout actor: requests in, groups out, tokens and pictures as separate objects."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.records import RolloutGroup, RolloutReceipt, RolloutRequest, WeightManifest
from stage_ray.workers.health import Pinged
from stage_ray.workers.logs import redirect_output
from stage_ray.workers.metrics import WorkerMetrics

if TYPE_CHECKING:
    from stage_ray.weights import Chunk


class RolloutWorker(Pinged):
    """One image engine. Updates its weights between waves only, so every image has one policy version (promise 2)."""

    def __init__(self, name: str, policy: PolicyConfig, rollout: RolloutConfig, log: str | None) -> None:
        redirect_output(log, "rollout")
        self._metrics = WorkerMetrics("rollout", name)
        from stage_ray.engines import build_engine  # after the redirection: importing vLLM talks

        self._name = name
        self._engine = build_engine(policy, rollout, worker=name)

    def generate(self, *requests: RolloutRequest) -> tuple[Any, ...]:
        """A receipt, then for each request its group (``images`` empty) and its pictures (uint8 [G, H, W, 3]).

        The learner never reads pictures and the driver reads neither: each object goes only where it is used.
        """
        start = time.perf_counter()
        self._metrics.begin(request.group_id for request in requests)
        groups = self._engine.generate(requests)
        seconds = time.perf_counter() - start
        self._metrics.done(groups, version=self._engine.policy_version)
        receipt = RolloutReceipt(self._name, self._engine.policy_version, seconds, _problem(requests, groups))
        objects: list[Any] = [receipt]
        for group in groups:
            bare = np.empty((len(group.seeds), 0, 0, 3), np.uint8)
            objects += [replace(group, images=bare), group.images]
        return tuple(objects)

    def load_weights(self, manifest: WeightManifest, *chunks: Chunk) -> int:
        """Verify a version and take it; the version now served.

        Raises:
            WeightError: it does not verify; the old version stays.
        """
        from stage_ray.weights import unpack

        self._engine.load_weights(manifest.version, unpack(manifest, chunks), known_finite=True)
        return self._engine.policy_version


def _problem(requests: Sequence[RolloutRequest], groups: Sequence[RolloutGroup]) -> str:
    """Why an engine's answer cannot be used, "" where it can. The driver, who asks, never sees the arrays."""
    for request, group in zip(requests, groups, strict=True):
        if group.group_id != request.group_id:
            return f"group {group.group_id} where {request.group_id} was asked for"
        for name in ("logprobs", "guided_logprobs", "entropy"):
            if not np.isfinite(getattr(group, name)).all():
                return f"group {group.group_id} has {name} that are not finite"
    return ""
