"""STAGE on the distribution that is sampled, guidance included: ours.

STAGE draws tokens from ``softmax((u + w (c - u)) / temperature)`` and trains the conditional branch c as if they had
come from it. Its k3 then estimates no KL, and a token that guidance had all but decided is pushed as hard as one that
was open: what such pushes do to c is noise for what is sampled. Here ratio and k3 are those of the guided distribution,
as in `stage_ray.recipes.ar_grpo`: the policy gradient of what is sampled, and an unbiased KL of it. Reward, similarity
and token weights are STAGE's (`stage_ray.recipes.stage`).

Costs a second forward and backward of the policy and a second forward of the reference. What it gains over GRPO,
STAGE, GCPO and AR-GRPO on ShapeWorld, and what it costs, stands in `configs/STUDIES.md`.
"""

from __future__ import annotations

from stage_ray.recipes.ar_grpo import GuidedObjective
from stage_ray.recipes.stage import StageOptions, StageRecipe


class GuidedStageOptions(StageOptions):
    """Options of ``recipe: guided_stage``: STAGE's; ``beta`` weighs the KL between the guided distributions."""


class GuidedStageRecipe(GuidedObjective, StageRecipe):
    """The credit of STAGE; ratio and KL of the guided distribution."""

    Options = GuidedStageOptions
    options: GuidedStageOptions
