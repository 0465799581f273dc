"""AR-GRPO: GRPO on the distribution that is sampled, guidance included (arXiv 2508.06924).

``L = mean over groups, images and tokens of (-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + beta k3)``, where ratio
and k3 are of log-probabilities under ``softmax((u + w (c - u)) / temperature)``; the gradient flows through the
conditional and the unconditional branch.

Derived from the paper; its code was not read. Left out: its eight rewards, which are scorers of a config here.
"""

from __future__ import annotations

from pydantic import Field

from stage_ray.config import RunConfig
from stage_ray.errors import ConfigError
from stage_ray.recipes.base import Credit, Objective, PolicyOutputs, ReferenceOutputs
from stage_ray.recipes.grpo import GrpoOptions, GrpoRecipe


class ArGrpoOptions(GrpoOptions):
    """Options of ``recipe: ar_grpo``; ``algorithm.clip`` is the paper's clip."""

    beta: float = Field(0.1, ge=0, description="Weight of the KL between the guided distributions")


class GuidedObjective(GrpoRecipe):
    """What makes a recipe one of the guided distribution: its ratio and its KL, through both branches.

    It stands before the recipe whose credit is taken, GRPO's where it stands alone.
    """

    needs_guided = True
    needs_guided_grad = True

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """Refuse top-k and top-p: a token that they leave out has no finite log-probability, nor a KL."""
        for name, value, off in (("top_k", run.rollout.top_k, 0), ("top_p", run.rollout.top_p, 1.0)):
            if value != off:
                why = "a token that it leaves out has no finite log-probability to train on"
                raise ConfigError(f"rollout.{name} = {value:g} must be {off:g} with recipe {run.recipe}: {why}")

    def objective(self, policy: PolicyOutputs, reference: ReferenceOutputs, credit: Credit) -> Objective:
        """``-sum(w A ratio) + beta * sum(v k3)`` over tokens, all of the guided distribution."""
        assert policy.guided_logprobs is not None and policy.guided_behavior_logprobs is not None
        assert reference.guided_logprobs is not None
        guided = PolicyOutputs(policy.guided_logprobs, policy.guided_behavior_logprobs, policy.entropy)
        return super().objective(guided, ReferenceOutputs(reference.guided_logprobs, reference.entropy), credit)


class ArGrpoRecipe(GuidedObjective):
    """GRPO's credit; ratio and KL of the guided distribution."""

    Options = ArGrpoOptions
    options: ArGrpoOptions
