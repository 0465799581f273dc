"""Token rules as a user writes them: named in test configs by dotted path."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from stage_ray.samplers import Context, SamplingParams, TokenRule


class NoRepeats(TokenRule):
    """Guided sampling where the last ``window`` tokens become less likely: it reads the tokens so far."""

    window: int = Field(2, ge=1)
    penalty: float = 4.0

    def logits(
        self, conditional: Tensor, unconditional: Tensor | None, params: SamplingParams, context: Context
    ) -> Tensor:
        logits = params.guide(conditional, unconditional) / params.temperature
        places = context.positions.unsqueeze(-1) - torch.arange(1, self.window + 1, device=logits.device)
        last = context.tokens.gather(-1, places.clamp(min=0))  # -1 where there is none
        weights = (places >= 0) * -self.penalty
        return params.truncate(logits.scatter_add(-1, last.clamp(min=0), weights))


class Wide(TokenRule):
    """One logit too many."""

    def logits(
        self, conditional: Tensor, unconditional: Tensor | None, params: SamplingParams, context: Context
    ) -> Tensor:
        return torch.nn.functional.pad(conditional, (0, 1))
