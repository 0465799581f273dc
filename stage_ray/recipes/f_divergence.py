"""GRPO or STAGE, held to the reference by another f-divergence than the reverse KL.

``L = policy term + beta * mean of v_t D_t``, where ``D_t`` compares the policy p and the reference q at a token:

* ``policy_reference``: ``KL(p || q)``, seeks modes, the usual choice;
* ``reference_policy``: ``KL(q || p)``, keeps every mode of the reference;
* ``jensen_shannon``: half of each against the mean of both; bounded by log 2.

``exact`` adds up over the vocabulary, at one more forward of the reference. Else a token drawn from p estimates value
and gradient (`algorithm/divergence.py`). GRPO's k3, differentiated as it stands, has the gradient of
``reference_policy`` although its value estimates ``policy_reference``.

After "Balancing performance and diversity" (arXiv 2606.21498), whose formulas could not be read: derived here. Older
groups' tokens are not reweighted in the divergence, as in GRPO's KL.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from stage_ray.algorithm.divergence import Divergence, estimated_divergence
from stage_ray.algorithm.losses import policy_term
from stage_ray.config import AlgorithmConfig
from stage_ray.recipes.base import Credit, GroupBatch, Objective, PolicyOutputs, ReferenceOutputs
from stage_ray.recipes.grpo import GrpoRecipe
from stage_ray.recipes.stage import StageOptions, StageRecipe


class FDivergenceOptions(StageOptions):
    """Options of ``recipe: f_divergence``; STAGE's own count where ``base`` is stage."""

    base: Literal["grpo", "stage"] = Field("stage", description="Recipe whose advantages and weights are taken")
    divergence: Divergence = Field("jensen_shannon", description="Distance of policy and reference")
    exact: bool = Field(True, description="Add up over the vocabulary, not over the drawn tokens")


class FDivergenceRecipe(StageRecipe):
    """The credit of GRPO or STAGE, and a divergence of choice."""

    Options = FDivergenceOptions
    options: FDivergenceOptions

    def __init__(self, options: Any, shared: AlgorithmConfig) -> None:
        super().__init__(options, shared)
        self.exact_divergence = options.divergence if options.exact else None

    def credit(self, batch: GroupBatch, reference: ReferenceOutputs, step: int) -> Credit:
        """Of the base recipe."""
        return (StageRecipe if self.options.base == "stage" else GrpoRecipe).credit(self, batch, reference, step)

    def objective(self, policy: PolicyOutputs, reference: ReferenceOutputs, credit: Credit) -> Objective:
        """``-sum(w A ratio) + beta * sum(v D)`` over tokens."""
        term = policy_term(
            policy.logprobs,
            policy.behavior_logprobs,
            credit.advantages,
            credit.weights.policy,
            clip=self.shared.clip,
            correction=self.correction,
        )
        divergence = policy.divergence  # over the vocabulary, where it is exact
        if divergence is None:
            divergence = estimated_divergence(policy.logprobs, reference.logprobs, self.options.divergence)
        held = (credit.weights.kl * divergence).sum()
        told = {"policy_loss": term.detach(), "divergence": held.detach()}
        objective = Objective(term + self.options.beta * held, told)
        return self._with_penalty(objective, policy, reference, credit)
