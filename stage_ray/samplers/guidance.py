"""How much guidance each token of an image has: a scale by its position, and images that have none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stage_ray.config import RolloutConfig
from stage_ray.samplers.base import Context


@dataclass(frozen=True, slots=True)
class GuidanceSchedule:
    """From an image's first scale to ``end`` at its last token: w of token t of T, with ``f = t / (T - 1)``.

    ``linear``: ``w0 + (end - w0) f``. ``cosine``: ``end + (w0 - end) (1 + cos(pi f)) / 2``, slow at both ends. Outside
    of tokens ``round(low T)`` up to, and without, ``round(high T)`` w is 1, (low, high) being the ``interval``.

    Example:
        >>> context = Context(torch.arange(4), torch.zeros(4, 4, dtype=torch.int64))
        >>> GuidanceSchedule("linear", 2.0, (0.0, 0.75)).scales(5.0, context).tolist()
        [5.0, 4.0, 3.0, 1.0]
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    end: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def of(cls, rollout: RolloutConfig) -> GuidanceSchedule:
        """The schedule of a config's ``rollout`` section."""
        return cls(rollout.guidance_schedule, rollout.guidance_end, rollout.guidance_interval)

    @property
    def constant(self) -> bool:
        """Whether every token has the first scale."""
        return self.kind == "constant" and self.interval == (0.0, 1.0)

    def guides(self, first: float) -> bool:
        """Whether any token's scale may be other than 1."""
        return first != 1.0 or (self.kind != "constant" and self.end != 1.0)

    def scales(self, first: float, context: Context) -> Tensor:
        """w of each token: float32 [B].

        Raises:
            ValueError: ``context`` does not say how many tokens an image has.
        """
        positions, tokens = context.positions, context.sequences.shape[-1]
        scales = torch.full_like(positions, first, dtype=torch.float32)
        if not self.constant:
            if not tokens:
                raise ValueError(f"guidance schedule {self.kind} over {self.interval} needs the images' tokens")
            part = positions.float() / max(1, tokens - 1)
            if self.kind == "linear":
                scales = first + (self.end - first) * part
            elif self.kind == "cosine":
                scales = self.end + (first - self.end) * (1 + (math.pi * part).cos()) / 2
            begins, ends = (round(share * tokens) for share in self.interval)
            scales = scales.where((positions >= begins) & (positions < ends), 1.0)
        return scales if context.guided is None else scales.where(context.guided, 1.0)
