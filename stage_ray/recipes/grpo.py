"""GRPO: group-relative policy optimisation (arXiv 2402.03300), with the ratio and the KL of every image token.

``L = mean over groups, images and tokens of (-ratio_it A_i + beta k3_it)`` with ``A_i = (r_i - mean) / (std + eps)``
over the group, unbiased std. A fresh token's ratio is 1, an older one's is corrected (`algorithm/off_policy.py`).

Left out: several epochs on one batch (each group is trained on once, so PPO's clip is off by default), and the division
by an answer's own length (every image has T tokens).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from stage_ray.algorithm.advantages import combine_rewards, group_advantages, silent_groups
from stage_ray.algorithm.losses import token_weights, weighted_loss
from stage_ray.algorithm.similarity import opposite_sign_similarity
from stage_ray.config import Section
from stage_ray.recipes.base import Credit, GroupBatch, Objective, PolicyOutputs, Recipe, ReferenceOutputs


class GrpoOptions(Section):
    """Options of ``recipe: grpo``."""

    beta: float = Field(0.03, ge=0, description="Weight of the KL to the reference model")


class GrpoRecipe(Recipe):
    """All tokens of a group weigh alike."""

    Options = GrpoOptions
    options: GrpoOptions

    def rewards(self, batch: GroupBatch) -> Tensor:
        """One reward an image, float [N, G]: its scores, as ``algorithm.combine`` says."""
        shared, weights = self.shared, batch.scorer_weights
        return combine_rewards(
            batch.scores, weights=weights, drop_constant=shared.drop_constant, zscore=shared.combine == "zscore"
        )

    def advantages(self, batch: GroupBatch) -> Tensor:
        """Normalised rewards, float [N, G]."""
        return group_advantages(self.rewards(batch), eps=self.shared.advantage_eps)

    def credit(self, batch: GroupBatch, reference: ReferenceOutputs, step: int) -> Credit:
        """Normalised rewards, and the same weight for every token.

        ``similarity/mean`` is reported and not used: it shows what STAGE would have weighed by.
        """
        advantages = self.advantages(batch)
        similarity = opposite_sign_similarity(batch.tokens, batch.codebook, advantages)
        silent = silent_groups(batch.scores, batch.scorer_weights)  # [N]
        similarity = similarity.masked_fill(silent[:, None, None], 1.0)  # as STAGE has it
        metrics = {"similarity/mean": similarity.mean().item(), "weight/mean": 1.0}
        return Credit(advantages, token_weights(reference.logprobs, None), metrics)  # None: no reweighting

    def objective(self, policy: PolicyOutputs, reference: ReferenceOutputs, credit: Credit) -> Objective:
        """``-sum(w A ratio) + beta * sum(v k3)`` over tokens."""
        parts = weighted_loss(
            policy.logprobs,
            reference.logprobs,
            policy.behavior_logprobs,
            credit.advantages,
            credit.weights,  # of these images, normalised over whole groups
            beta=self.options.beta,
            clip=self.shared.clip,
            correction=self.correction,
            kl_ratio_cap=self.shared.kl_ratio_cap,
        )
        return Objective(parts.loss, {"policy_loss": parts.policy})
