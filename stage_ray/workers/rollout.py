"""The rollout actor: requests in, groups out, tokens and pictures as separate objects."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.records import RolloutReceipt, RolloutRequest, WeightManifest
from stage_ray.workers.logs import redirect_output


class RolloutWorker:
    """One image engine. Updates its weights between waves only, so every image has one policy version (promise 2)."""

    def __init__(self, name: str, policy: PolicyConfig, rollout: RolloutConfig, log: str | None) -> None:
        redirect_output(log)
        from stage_ray.engines import build_engine  # after the redirection: importing vLLM talks

        self._name = name
        self._engine = build_engine(policy, rollout, worker=name)

    def generate(self, *requests: RolloutRequest) -> tuple[Any, ...]:
        """A receipt, then for each request its group (``images`` empty) and its pictures (uint8 [G, H, W, 3]).

        The learner never reads pictures and the driver reads neither: each object goes only where it is used.
        """
        start = time.perf_counter()
        groups = self._engine.generate(requests)
        receipt = RolloutReceipt(self._name, self._engine.policy_version, time.perf_counter() - start)
        objects: list[Any] = [receipt]
        for group in groups:
            bare = np.empty((len(group.seeds), 0, 0, 3), np.uint8)
            objects += [replace(group, images=bare), group.images]
        return tuple(objects)

    def load_weights(self, manifest: WeightManifest, *chunks: np.ndarray) -> int:
        """Verify a version and take it; the version now served.

        Raises:
            WeightError: it does not verify; the old version stays.
        """
        from stage_ray.weights import unpack

        self._engine.load_weights(manifest.version, unpack(manifest, list(chunks)))
        return self._engine.policy_version
