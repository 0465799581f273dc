"""STAGE on the distribution that is sampled, guidance included: ours.

STAGE draws tokens from ``softmax((u + w (c - u)) / temperature)`` and trains the conditional branch c as if they had
come from it. Its k3 then estimates no KL, and tokens that guidance alone made likely are pushed as hard as any. Here
ratio and k3 are those of the guided distribution, as in `stage_ray.recipes.ar_grpo`: the policy gradient of what is
sampled, and an unbiased KL of it. Reward, similarity and token weights are STAGE's (`stage_ray.recipes.stage`).

Costs a second forward and backward of the policy and a second forward of the reference.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from stage_ray.config import AlgorithmConfig
from stage_ray.recipes.ar_grpo import ArGrpoRecipe
from stage_ray.recipes.base import GuidedGrad
from stage_ray.recipes.stage import StageOptions, StageRecipe


class GuidedStageOptions(StageOptions):
    """Options of ``recipe: guided_stage``: STAGE's; ``beta`` weighs the KL between the guided distributions."""

    branches: GuidedGrad = Field(
        "conditional", description="Branches through which the guided probabilities are trained"
    )


class GuidedStageRecipe(ArGrpoRecipe, StageRecipe):
    """The credit of STAGE, the objective of AR-GRPO."""

    Options = GuidedStageOptions
    options: GuidedStageOptions

    def __init__(self, options: Any, shared: AlgorithmConfig) -> None:
        super().__init__(options, shared)
        self.guided_grad = options.branches
