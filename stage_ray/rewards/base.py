"""What a reward is: images and their prompts in, a score and its validity per image out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from stage_ray.records import Prompt, RolloutGroup


@dataclass(frozen=True, slots=True)
class RewardOutput:
    """Scores of B images.

    Attributes:
        scores: float32 [B]; NaN where the scorer has no answer.
        valid: bool [B]; False where the score must not be used.
        details: what is behind each score, JSON-able, one mapping an image. ``verdict`` (bool), where a scorer gives
            it, says whether the image is right: pictures for people are framed by it.
        features: float32 [B, D], vectors of the images that recipes may compare; they travel with the scores.
    """

    scores: np.ndarray
    valid: np.ndarray
    details: tuple[Mapping[str, Any], ...]
    features: np.ndarray | None = None


UNAVAILABLE = "service unavailable"
"""Stands in the ``error`` of an image whose scorer raised a `ServiceUnavailableError`."""


class ServiceUnavailableError(Exception):
    """A service that a scorer asks is down, or has no room: its groups wait for it, up to ``scoring.outage_s``."""


class Reward(Protocol):
    """A scorer. Built once in a reward worker from its config's ``options``; knows nothing of who calls it.

    A scorer may have a class method ``check(prompts, **options)``, which is asked before anything is started: it gives
    the prompts that it could not judge, each with the reason, as pairs (`Prompt`, text), and raises a `ConfigError` for
    options that lead nowhere, such as a directory without the weights of its model.
    """

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt."""
        ...


@runtime_checkable
class GroupReward(Protocol):
    """A scorer that compares the images of a group: it has `score_groups`, and needs no `score`."""

    def score_groups(self, groups: Sequence[RolloutGroup]) -> RewardOutput:
        """Score whole groups; B is the number of their images, group after group."""
        ...
