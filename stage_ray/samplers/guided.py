"""Classifier-free guidance, then temperature, top-k and top-p: the default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from stage_ray.samplers.base import Context, TokenRule

if TYPE_CHECKING:
    from stage_ray.samplers.params import SamplingParams


class GuidedRule(TokenRule):
    """``(u + w (c - u)) / temperature``, cut by top-k and top-p."""

    def logits(
        self, conditional: Tensor, unconditional: Tensor | None, params: SamplingParams, context: Context
    ) -> Tensor:
        """See `TokenRule.logits`."""
        logits = params.guide(conditional, unconditional, context)
        if params.temperature != 1.0:
            logits = logits / params.temperature
        return params.truncate(logits)
