"""STAGE: similarity-aware GRPO with an entropy reward, for autoregressive image models (arXiv 2509.25027).

``L = -J + beta * KL``, mean over groups, where ``s_it`` is the mean cosine of a token's codebook vector to the same
place in the images of opposite advantage (`algorithm/similarity.py`):

* ``J = sum_it w_it ratio_it A_i / (sum_it w_it + 1e-6)`` with ``w = clip((1 - s) / 2, 0, 1)``: a token that good and
  bad images share counts for little;
* ``KL = mean_it kappa_it k3_it`` with ``kappa = 0.5 + 0.5 clip(1 + s, 0, 1)``: a token that should move is held less;
* the best images of a group get ``entropy_reward * (e_i - mean e)``, ``e = 1 / (1 + (H_ref - H)^2)``, as more reward.

This is what the published code does. Left out are its switches that are off by default: progressive scorers, updates of
the reference, and the KL scaled by the learning rate. Entropies are those recorded while sampling, not a second pass's.
"""

from __future__ import annotations

from pydantic import Field

from stage_ray.algorithm.credit import stage_credit
from stage_ray.algorithm.losses import token_weights
from stage_ray.algorithm.similarity import advantage_weight
from stage_ray.recipes.base import Credit, GroupBatch, ReferenceOutputs
from stage_ray.recipes.grpo import GrpoOptions, GrpoRecipe


class StageOptions(GrpoOptions):
    """Options of ``recipe: stage``; every switch off is plain GRPO."""

    reweight_advantage: bool = Field(True, description="Similarity-aware weight of the policy term")
    reweight_kl: bool = Field(True, description="Similarity-aware weight of the KL")
    entropy_reward: float = Field(0.4, ge=0, description="Weight of the entropy reward; 0 is off")
    entropy_best_only: bool = Field(True, description="Entropy reward for the best images of a group only")


class StageRecipe(GrpoRecipe):
    """GRPO's objective with STAGE's rewards and token weights."""

    Options = StageOptions
    options: StageOptions

    def credit(self, batch: GroupBatch, reference: ReferenceOutputs, step: int) -> Credit:
        """Rewards with the entropy reward, and weights by similarity."""
        options = self.options
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
            eps=self.shared.advantage_eps,
        )
        weights = token_weights(
            reference.logprobs,  # only its shape, dtype and device count
            similarity,
            reweight_advantage=options.reweight_advantage,
            reweight_kl=options.reweight_kl,
        )
        mean_weight = advantage_weight(similarity).mean().item() if options.reweight_advantage else 1.0
        metrics = {"similarity/mean": similarity.mean().item(), "weight/mean": mean_weight}
        return Credit(advantages, weights, metrics)
