"""SARS and time-aware weights over two scorers (Customized-GRPO, arXiv 2510.18263, ACL 2026).

Each scorer's rewards are normalised on their own: ``A_1``, ``A_2``. An image gains ``gamma tanh(A_1 A_2)`` where at
least one of the two is positive and loses as much where none is: agreement on good images is rewarded, conflict and
agreement on bad ones are punished. Token t of T then has ``w_1(t) A_1 + (1 - w_1(t)) A_2 + bonus``, clamped to 5.

``w_1`` follows the published code at ``tau = floor(25 t / T)``: ``high`` before 6, a sigmoid down to ``low`` from 6 to
21, 0.5 from 22 on. Ported from diffusion: the first tokens take the part of the first denoising steps. The first scorer
of ``rewards`` takes the part of its preference score, the second that of its identity score. ``gamma`` is the paper's;
the published script's default is 0.5. Left out: the paper's other rules for conflicts.
"""

from __future__ import annotations

import torch
from pydantic import Field

from stage_ray.algorithm.advantages import group_advantages
from stage_ray.algorithm.losses import token_weights
from stage_ray.config import RunConfig
from stage_ray.errors import ConfigError
from stage_ray.recipes.base import Credit, GroupBatch, ReferenceOutputs
from stage_ray.recipes.grpo import GrpoOptions, GrpoRecipe

STEPS, FALLING, LAST, CENTER, SLOPE, MOST = 25, 6, 22, 10, 0.8, 5.0  # constants of the published code


class SynergyOptions(GrpoOptions):
    """Options of ``recipe: synergy``."""

    gamma: float = Field(0.4, ge=0, description="Weight of the bonus for agreement")
    high: float = Field(0.7, ge=0, le=1, description="Weight of the first scorer at an image's beginning")
    low: float = Field(0.3, ge=0, le=1, description="Weight of the first scorer after the middle")


class SynergyRecipe(GrpoRecipe):
    """GRPO's objective; advantages of two scorers, mixed token by token."""

    Options = SynergyOptions
    options: SynergyOptions

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """Refuse any number of scorers but two, and another way to combine them."""
        if len(run.rewards) != 2:
            raise ConfigError(f"recipe = {run.recipe!r} mixes two scorers, but rewards has {len(run.rewards)}")
        if run.algorithm.combine != "sum":
            raise ConfigError(
                f"algorithm.combine = {run.algorithm.combine!r}: recipe {run.recipe} mixes scorers in its own way; "
                "leave it out"
            )

    def credit(self, batch: GroupBatch, reference: ReferenceOutputs, step: int) -> Credit:
        """Token advantages [N, G, T]; all tokens weigh alike."""
        first, second = (group_advantages(batch.scores[..., i], eps=self.shared.advantage_eps) for i in (0, 1))
        product = torch.tanh(first * second)
        bonus = self.options.gamma * torch.where((first > 0) | (second > 0), product, -product)  # [N, G]
        high, low, tokens = self.options.high, self.options.low, batch.tokens.shape[-1]
        time = torch.arange(tokens, dtype=torch.float64) * STEPS // tokens
        falling = low + (high - low) * (1 - torch.sigmoid(SLOPE * (time - CENTER)))
        share = torch.where(time < FALLING, high, torch.where(time >= LAST, 0.5, falling)).to(first)  # [T], w_1
        mixed = share * first.unsqueeze(-1) + (1 - share) * second.unsqueeze(-1) + bonus.unsqueeze(-1)
        return Credit(mixed.clamp(-MOST, MOST), token_weights(reference.logprobs, None), {"weight/mean": 1.0})
