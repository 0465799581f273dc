"""What a reward is: images and their prompts in, a score and its validity per image out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stage_ray.records import Prompt


@dataclass(frozen=True, slots=True)
class RewardOutput:
    """Scores of B images.

    Attributes:
        scores: float32 [B]; NaN where the scorer has no answer.
        valid: bool [B]; False where the score must not be used.
        details: JSON-able facts behind each score, one mapping an image.

    Example:
        >>> RewardOutput(np.ones(1, np.float32), np.ones(1, bool), ({"correct": True},)).details[0]["correct"]
        True
    """

    scores: np.ndarray
    valid: np.ndarray
    details: tuple[Mapping[str, Any], ...]


class Reward(Protocol):
    """A scorer. Built once in a reward worker from its config's ``options``; knows nothing of who calls it."""

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt."""
        ...
