"""GCPO: group critical-token policy optimisation (arXiv 2509.22485, ICLR 2026).

Of each image about three tokens in ten are trained on, ``C``: the first tenth; the tenth with the greatest gradient of
the smoothed map of guided entropies, among the middle 80 %; and, of the rest, the tenth where the images of the group
agree least. The loss is the mean over ``C`` of ``-d_t ratio_t A + beta k3_t`` with the dynamic weight
``d_t = mean over t' <= t of exp(clamp(log p - log p_ref, -0.5, 0.5))``.

As in the published code: the weight is of the exponentials (the paper's is of the log-ratios), and tokens outside of
``C`` carry no KL and do not count in the mean. Different here: the weight has no gradient (there it has one), and
images are compared by codebook vectors, as in STAGE (there by the embeddings that the language model reads).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from stage_ray.algorithm.losses import TokenWeights
from stage_ray.recipes.base import Credit, GroupBatch, Objective, PolicyOutputs, ReferenceOutputs
from stage_ray.recipes.grpo import GrpoOptions, GrpoRecipe


class GcpoOptions(GrpoOptions):
    """Options of ``recipe: gcpo``; three shares of an image's tokens."""

    beta: float = Field(0.01, ge=0, description="Weight of the KL to the reference model")
    first: float = Field(0.1, ge=0, le=1, description="Tokens at the beginning of an image")
    edges: float = Field(0.1, ge=0, le=0.8, description="Tokens where the guided entropy changes most over the grid")
    diverse: float = Field(0.1, ge=0, le=1, description="Tokens where the images of a group agree least, of the rest")
    drift: float = Field(0.5, ge=0, description="Bound of |log p - log p_ref| in a token's dynamic weight")


class GcpoRecipe(GrpoRecipe):
    """GRPO on the critical tokens of each image."""

    Options = GcpoOptions
    options: GcpoOptions

    def credit(self, batch: GroupBatch, reference: ReferenceOutputs, step: int) -> Credit:
        """GRPO's advantages; critical tokens weigh alike, the others nothing."""
        critical = self.critical_tokens(batch)
        share = critical / critical.sum(dim=(1, 2), keepdim=True).clamp(min=1) / len(critical)
        metrics = {"weight/mean": critical.mean().item()}
        return Credit(self.advantages(batch), TokenWeights(share, share), metrics)

    def critical_tokens(self, batch: GroupBatch) -> Tensor:
        """1 for each token that is trained on, else 0: float32 [N, G, T]."""
        count = batch.tokens.shape[-1]
        chosen = torch.zeros_like(batch.entropy, dtype=torch.bool)
        chosen[..., : int(count * self.options.first)] = True
        start, length = int(count * 0.1), int(count * 0.8)
        edges = entropy_gradient(batch.guided_entropy.unflatten(-1, batch.grid)).flatten(-2)
        middle = edges[..., start : start + length]
        chosen.scatter_(-1, middle.topk(int(count * self.options.edges), dim=-1).indices + start, True)
        alike = group_similarity(batch.tokens, batch.codebook).unsqueeze(1).expand_as(batch.entropy)
        rest = alike.masked_fill(chosen, torch.inf)
        least = rest.topk(int(count * self.options.diverse), dim=-1, largest=False).indices
        return chosen.scatter(-1, least, True).float()

    def objective(self, policy: PolicyOutputs, reference: ReferenceOutputs, credit: Credit) -> Objective:
        """``-sum(w d A ratio) + beta * sum(v k3)`` over tokens, ``d`` without gradient."""
        drift = (policy.logprobs.detach() - reference.logprobs).clamp(-self.options.drift, self.options.drift)  # [B, T]
        seen = torch.arange(1, drift.shape[-1] + 1, device=drift.device)
        dynamic = drift.exp().cumsum(dim=-1) / seen
        weights = TokenWeights(credit.weights.policy * dynamic, credit.weights.kl)
        return super().objective(policy, reference, replace(credit, weights=weights))


def entropy_gradient(entropy: Tensor) -> Tensor:
    """Size of the gradient of entropy maps [..., h, w], each first smoothed over what precedes a token.

    A token's smoothed value is the mean of itself and of its neighbours to the left, upper left, above and upper right,
    as far as they exist; the gradient is of central differences, one-sided at the border. h and w are at least 2.
    """
    maps = F.pad(entropy, (1, 1, 1, 0))  # a column on both sides, a row above
    there = F.pad(torch.ones_like(entropy), (1, 1, 1, 0))
    height, width = entropy.shape[-2:]
    offsets = ((1, 1), (1, 0), (0, 0), (0, 1), (0, 2))  # of row and column: self, left, upper left, above, upper right

    def window(maps: Tensor) -> Tensor:
        return sum((maps[..., i : i + height, j : j + width] for i, j in offsets), torch.zeros_like(entropy))

    smooth = window(maps) / window(there)
    down, right = torch.gradient(smooth, dim=(-2, -1))
    return (down.square() + right.square()).sqrt()


def group_similarity(tokens: Tensor, codebook: Tensor) -> Tensor:
    """Mean cosine of the codebook vectors [V, D] of each two images' tokens [N, G, T], place by place: float [N, T]."""
    vectors = F.normalize(codebook, dim=-1)[tokens]  # [N, G, T, D]
    images = tokens.shape[1]
    pairs = vectors.sum(dim=1).square().sum(dim=-1) - vectors.square().sum(dim=(1, 3))  # of all i != j, both orders
    return pairs / (images * (images - 1))
