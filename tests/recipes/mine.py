"""A recipe from outside the package: REINFORCE on the tokens that were least certain, with an entropy bonus."""

from __future__ import annotations

import torch
from pydantic import Field

from stage_ray.algorithm import group_advantages
from stage_ray.algorithm.losses import TokenWeights
from stage_ray.config import Section
from stage_ray.recipes.base import Credit, GroupBatch, Objective, PolicyOutputs, Recipe, ReferenceOutputs


class UncertainOptions(Section):
    """``share`` of tokens that are trained, and the entropy bonus' weight."""

    share: float = Field(0.5, gt=0, le=1)
    bonus: float = Field(0.01, ge=0)


class UncertainRecipe(Recipe):
    """Takes everything that the contract offers: token advantages, the guided distribution, the entropy's gradient."""

    Options = UncertainOptions
    options: UncertainOptions
    needs_guided = True
    needs_entropy_grad = True

    def credit(self, batch: GroupBatch, reference: ReferenceOutputs, step: int) -> Credit:
        assert [group.prompt.text for group in batch.groups] and batch.codebook.dim() == 2
        assert batch.scorers == ("geneval",) and batch.scorer_weights.tolist() == [1.0]
        assert reference.guided_logprobs is not None and reference.guided_logprobs.shape == batch.tokens.shape
        advantages = group_advantages(batch.scores @ batch.scorer_weights, eps=self.shared.advantage_eps)
        least = batch.entropy.flatten(1).quantile(1 - self.options.share, dim=1)
        chosen = (batch.entropy >= least[:, None, None]).float()
        share = chosen / chosen.sum(dim=(1, 2), keepdim=True) / len(chosen)
        metrics = {"uncertain/share": chosen.mean().item(), "uncertain/step": float(step)}
        return Credit(advantages.unsqueeze(-1) * chosen, TokenWeights(share, torch.zeros_like(share)), metrics)

    def objective(self, policy: PolicyOutputs, reference: ReferenceOutputs, credit: Credit) -> Objective:
        assert policy.guided_logprobs is not None and policy.guided_behavior_logprobs is not None
        assert reference.guided_logprobs is not None and reference.guided_logprobs.shape == policy.logprobs.shape
        bonus = (credit.weights.policy * policy.entropy).sum()
        gain = (credit.weights.policy * credit.advantages * policy.logprobs).sum()
        return Objective(-gain - self.options.bonus * bonus, {"uncertain/bonus": bonus.detach()})
