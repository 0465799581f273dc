"""Entropy-informed decoding (arXiv 2510.09012): a temperature for each token, by the entropy of its guided logits.

Where the model is sure, as in flat regions, tokens are drawn hotter; where it is torn, cooler. The defaults are the
paper's constants, for vocabularies of 16,384 tokens. Over ShapeWorld's 512, where entropy ends at ln 512 = 6.24 nats,
they never cool below 0.91; ``README.md`` beside this file has others for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from stage_ray.samplers.base import Context, TokenRule

if TYPE_CHECKING:
    from stage_ray.samplers.params import SamplingParams

LOWEST = -1e3  # in place of minus infinity, which times a probability of 0 is NaN


class EntropyInformedRule(TokenRule):
    """Guidance, then division by ``temperature * (a exp(-H / b) + c)``, then top-k and top-p.

    H is the entropy of the guided logits at temperature 1, in nats. Where the learner differentiates the distribution,
    it differentiates the temperature too.
    """

    a: float = Field(2.5, ge=0, description="What low entropy adds to the temperature's factor, at most")
    b: float = Field(3.0, gt=0, description="Nats of entropy over which what a adds falls to 1/e")
    c: float = Field(0.6, gt=0, description="The temperature's factor at high entropy")

    def logits(
        self, conditional: Tensor, unconditional: Tensor | None, params: SamplingParams, context: Context
    ) -> Tensor:
        """See `TokenRule.logits`."""
        logits = params.guide(conditional, unconditional, context)
        logp = logits.log_softmax(dim=-1)
        entropy = -(logp.exp() * logp.clamp(min=LOWEST)).sum(dim=-1, keepdim=True)  # [B, 1]
        return params.truncate(logits / (params.temperature * (self.a * (-entropy / self.b).exp() + self.c)))
