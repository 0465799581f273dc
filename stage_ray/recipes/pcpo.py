"""PCPO: GRPO with a log-hinge in place of the clip (arXiv 2509.25774, ICLR 2026).

``L = mean of max(0, xi |A| - A log ratio) + beta k3``: a token pulls with ``A grad log p`` until its ratio has moved by
``xi`` nats in the direction that its advantage wants, and then no more. At the first update of a batch the ratio is 1,
so the gradient is GRPO's: use ``learner.updates_per_batch`` of 2 or more.

The paper's proportionate credit evens out what denoising steps weigh. Tokens in raster order all weigh alike, so
`position_weights` is 1 here; a next-scale model overrides it with ``1 / (h_k w_k)`` of a token's scale. The code was
not read.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from stage_ray.algorithm.losses import TokenWeights, k3_kl
from stage_ray.recipes.base import Credit, GroupBatch, Objective, PolicyOutputs, ReferenceOutputs
from stage_ray.recipes.grpo import GrpoOptions, GrpoRecipe


class PcpoOptions(GrpoOptions):
    """Options of ``recipe: pcpo``."""

    xi: float = Field(0.2, gt=0, description="Nats by which a token's ratio moves before it pulls no more")


class PcpoRecipe(GrpoRecipe):
    """GRPO's credit; a hinge on the log-ratio."""

    Options = PcpoOptions
    options: PcpoOptions
    bounded = True

    def position_weights(self, batch: GroupBatch) -> Tensor:
        """Weight of each position of an image, float [T], mean 1: all alike in raster order."""
        return torch.ones(batch.tokens.shape[-1], device=batch.tokens.device)

    def credit(self, batch: GroupBatch, reference: ReferenceOutputs, step: int) -> Credit:
        """GRPO's, its policy weights times those of the positions."""
        credit = super().credit(batch, reference, step)
        weights = TokenWeights(credit.weights.policy * self.position_weights(batch), credit.weights.kl)
        return replace(credit, weights=weights)

    def objective(self, policy: PolicyOutputs, reference: ReferenceOutputs, credit: Credit) -> Objective:
        """``sum(w max(0, xi |A| - A log ratio)) + beta * sum(v k3)`` over tokens."""
        advantages = credit.advantages.unsqueeze(-1)  # [B, 1]
        log_ratio = policy.logprobs - policy.behavior_logprobs.detach()
        hinge = torch.relu(self.options.xi * advantages.abs() - advantages * log_ratio)
        term = (credit.weights.policy * hinge).sum()
        kl = (credit.weights.kl * k3_kl(policy.logprobs, reference.logprobs, ratio_cap=self.shared.kl_ratio_cap)).sum()
        return Objective(term + self.options.beta * kl, {"policy_loss": term.detach()})
