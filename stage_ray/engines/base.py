"""What an image engine is: it turns requests into groups, all at one policy version."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from stage_ray.records import RolloutGroup, RolloutRequest


class ImageEngine(Protocol):
    """Guided sampling of autoregressive image tokens.

    Sampling is replayable (promise 5): token t of an image with seed s depends on (s, t) and the logits only.
    """

    policy_version: int

    @property
    def codebook_size(self) -> int:
        """V: every token it draws is one of 0..V-1."""
        ...

    def generate(self, requests: Sequence[RolloutRequest]) -> list[RolloutGroup]:
        """Sample every image of every request, in waves of any size; groups come back in the order of the requests."""
        ...

    def load_weights(
        self, version: int, tensors: Iterable[tuple[str, torch.Tensor]], *, known_finite: bool = False
    ) -> None:
        """Take new values of the trained tensors (names as in the policy's ``state_dict``) between waves.

        The engine may keep them, and does not write to them. Where ``known_finite``, it need not look.

        Raises:
            ValueError: a tensor is unknown, missing, of another shape or not finite; the old version stays.
        """
        ...

    def sleep(self) -> None:
        """Leave a GPU's memory to others until the next wave or version; nothing is lost."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
