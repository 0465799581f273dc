"""STAGE: similarity-aware GRPO with an entropy reward, for autoregressive image models (arXiv 2509.25027).

``L = -J + beta * KL``, mean over groups, where ``s_it`` is the mean cosine of a token's codebook vector to the same
place in the images of opposite advantage (`algorithm/similarity.py`):

* ``J = sum_it w_it ratio_it A_i / (sum_it w_it + 1e-6)`` with ``w = clip((1 - s) / 2, 0, 1)``: a token that good and
  bad images share counts for little;
* ``KL = mean_it kappa_it k3_it`` with ``kappa = a + b clip(1 + s, 0, 1)``: a token that should move is held less;
* the best images of a group get ``entropy_reward * (e_i - mean e)``, ``e = 1 / (1 + (H_ref - H)^2)``, as more reward.

The defaults are what the published code runs; every switch that it has beside them is an option, off as it is there.
``algorithm/README.md`` holds paper, code and this against each other, quantity by quantity.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from stage_ray.algorithm.advantages import silent_groups
from stage_ray.algorithm.credit import stage_credit
from stage_ray.algorithm.losses import TokenWeights, token_weights
from stage_ray.algorithm.similarity import advantage_weight
from stage_ray.config import AlgorithmConfig
from stage_ray.recipes.base import Credit, GroupBatch, Objective, PolicyOutputs, ReferenceOutputs
from stage_ray.recipes.grpo import GrpoOptions, GrpoRecipe


class StageOptions(GrpoOptions):
    """Options of ``recipe: stage``; every switch off is plain GRPO."""

    reweight_advantage: bool = Field(True, description="Similarity-aware weight of the policy term")
    reweight_kl: bool = Field(True, description="Similarity-aware weight of the KL")
    entropy_reward: float = Field(0.4, ge=0, description="Weight of the entropy reward; 0 is off")
    entropy_best_only: bool = Field(True, description="Entropy reward for the best images of a group only")
    kl_floor: float = Field(0.5, ge=0, description="a of the KL's weight a + b clip(1 + s, 0, 1)")
    kl_slope: float = Field(0.5, ge=0, description="b of the KL's weight")
    weight_cap: float | None = Field(
        None, gt=0, description="Greatest share of one token in its group's policy term; null is off"
    )
    progressive: bool = Field(
        False, description="Leave out scorers by which a group is still too bad; falls to nothing in half the steps"
    )
    drop_silent_kl: bool = Field(False, description="No KL for groups that no scorer tells apart")
    kl_follows_lr: bool = Field(False, description="Scale the KL with the learning rate over its peak")
    entropy_penalty: float = Field(
        0.0, ge=0, description="Weight of the squared gap of an image's mean entropy to the reference's, in the loss"
    )


class StageRecipe(GrpoRecipe):
    """GRPO's objective with STAGE's rewards and token weights."""

    Options = StageOptions
    options: StageOptions

    def __init__(self, options: Any, shared: AlgorithmConfig) -> None:
        super().__init__(options, shared)
        self.needs_entropy_grad = options.entropy_penalty > 0

    def credit(self, batch: GroupBatch, reference: ReferenceOutputs, step: int) -> Credit:
        """Rewards with the entropy reward, and weights by similarity."""
        options = self.options
        progress = batch.progress if options.progressive else None
        advantages, similarity = stage_credit(
            batch.scores,
            batch.entropy.mean(dim=-1),  # [N, G], an image's mean
            reference.entropy.mean(dim=-1),
            batch.tokens,
            batch.codebook,
            weights=batch.scorer_weights,
            drop_constant=self.shared.drop_constant,
            zscore=self.shared.combine == "zscore",
            entropy_weight=options.entropy_reward,
            entropy_best_only=options.entropy_best_only,
            progress=progress,
            eps=self.shared.advantage_eps,
        )
        weights = token_weights(
            reference.logprobs,  # only its shape, dtype and device count
            similarity,
            reweight_advantage=options.reweight_advantage,
            reweight_kl=options.reweight_kl,
            kl_floor=options.kl_floor,
            kl_slope=options.kl_slope,
            most=options.weight_cap,
        )
        mean_weight = advantage_weight(similarity).mean().item() if options.reweight_advantage else 1.0
        metrics = {"similarity/mean": similarity.mean().item(), "weight/mean": mean_weight}
        images = torch.full_like(advantages, 1 / advantages.numel()) if options.entropy_penalty else None
        return Credit(advantages, self._held(weights, batch, progress), metrics, images)

    def objective(self, policy: PolicyOutputs, reference: ReferenceOutputs, credit: Credit) -> Objective:
        """GRPO's, and the penalty of entropies that part from the reference's."""
        return self._with_penalty(super().objective(policy, reference, credit), policy, reference, credit)

    def _held(self, weights: TokenWeights, batch: GroupBatch, progress: float | None) -> TokenWeights:
        """The weights of the KL as the learning rate and groups without a telling scorer change them."""
        kl = weights.kl * batch.lr_factor if self.options.kl_follows_lr else weights.kl
        if self.options.drop_silent_kl:
            silent = silent_groups(batch.scores, batch.scorer_weights, progress)
            kl = kl.masked_fill(silent[:, None, None], 0.0)
        return replace(weights, kl=kl)

    def _with_penalty(
        self, objective: Objective, policy: PolicyOutputs, reference: ReferenceOutputs, credit: Credit
    ) -> Objective:
        """``+ entropy_penalty * mean_i (H_i - H_ref,i)^2`` with gradient through ``H_i``, where that is on."""
        if credit.images is None:
            return objective
        gaps = (policy.entropy.mean(dim=-1) - reference.entropy.mean(dim=-1)).square()  # [B], of means over tokens
        penalty: Tensor = self.options.entropy_penalty * (credit.images * gaps).sum()
        return Objective(objective.loss + penalty, {**objective.parts, "entropy_penalty": penalty.detach()})
