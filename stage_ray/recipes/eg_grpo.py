"""EG-GRPO: entropy-gated GRPO (arXiv 2604.02355, ICLR 2026).

A token's advantage is ``(A + min(bonus |A|, bonus H_t) [H_t > median]) [H_t >= 20th percentile]`` with ``H_t`` its
entropy over ``log V``, without gradient: uncertain tokens gain a little, certain ones are left out. Those left out
still count in the mean and carry the KL, which is GRPO's.

As in the published code: the thresholds are the values at ``int(0.5 T)`` and ``int(0.2 T)`` of an image's sorted
entropies, the bonus is added to negative advantages too, and its two caps share one constant. Left out: the same gate
on text tokens (no recipe here samples text). The entropy is that recorded while sampling, of the conditional branch.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from stage_ray.algorithm.losses import token_weights
from stage_ray.recipes.base import Credit, GroupBatch, ReferenceOutputs
from stage_ray.recipes.grpo import GrpoOptions, GrpoRecipe


class EgGrpoOptions(GrpoOptions):
    """Options of ``recipe: eg_grpo``."""

    beta: float = Field(0.01, ge=0, description="Weight of the KL to the reference model")
    bonus: float = Field(0.3, ge=0, description="Most that an uncertain token gains, of |A| and of H / log V")
    uncertain: float = Field(0.5, ge=0, lt=1, description="Share of an image's tokens below which none gains")
    certain: float = Field(
        0.2, ge=0, lt=1, description="Share of an image's tokens that are left out, the most certain"
    )


class EgGrpoRecipe(GrpoRecipe):
    """GRPO whose advantages are gated token by token."""

    Options = EgGrpoOptions
    options: EgGrpoOptions

    def credit(self, batch: GroupBatch, reference: ReferenceOutputs, step: int) -> Credit:
        """GRPO's advantages, gated; all tokens weigh alike."""
        options, entropy = self.options, batch.entropy / math.log(len(batch.codebook))  # [N, G, T], 1 at most
        advantages = self.advantages(batch).unsqueeze(-1)  # [N, G, 1]
        gain = torch.minimum(options.bonus * advantages.abs(), options.bonus * entropy)
        raised = advantages + gain * (entropy > _at(entropy, options.uncertain))
        kept = entropy >= _at(entropy, options.certain)
        metrics = {"weight/mean": kept.float().mean().item()}
        return Credit(raised * kept, token_weights(reference.logprobs, None), metrics)


def _at(entropy: Tensor, share: float) -> Tensor:
    """The value at ``int(share T)`` of each image's sorted entropies, [..., 1]."""
    return entropy.sort(dim=-1).values[..., int(share * entropy.shape[-1]), None]
