"""DiverseGRPO: a bonus for images of small clusters, and a KL on the early tokens (arXiv 2512.21514, CVPR 2026).

The images of a group are clustered by what one scorer sees in them: affinity ``exp(-d^2 / (2 sigma^2))`` of the cosine
distance ``d`` of its features, then normalised spectral clustering. An image of a cluster of n gains
``bonus * sqrt(G / n)``; rewards are normalised afterwards. The KL counts on the first third of the tokens alone.

Ported from diffusion, where early denoising steps decide the structure: here the early tokens do. The paper measures
distances by DreamSim; any scorer that returns ``features`` serves. Left out: LoRA and its clip of 1e-4, which is
``algorithm.clip``. The code was not read.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.nn import functional as F

from stage_ray.algorithm.advantages import silent_groups
from stage_ray.algorithm.losses import TokenWeights, token_weights
from stage_ray.config import RunConfig
from stage_ray.errors import ConfigError, RunError
from stage_ray.recipes.base import Credit, GroupBatch, ReferenceOutputs
from stage_ray.recipes.grpo import GrpoOptions, GrpoRecipe


class DiverseGrpoOptions(GrpoOptions):
    """Options of ``recipe: diverse_grpo``."""

    features: str | None = Field(None, description="Scorer whose features are compared; null: the one that has any")
    bonus: float = Field(0.3, ge=0, description="Weight of sqrt(G / n) in the reward of an image of a cluster of n")
    clusters: int | None = Field(None, ge=2, description="Clusters of a group; null: where the eigenvalues part most")
    sigma: float = Field(0.3, gt=0, description="Distance at which the affinity of two images has fallen to 0.6")
    early: float = Field(1 / 3, gt=0, le=1, description="Share of an image's tokens that the KL holds")


class DiverseGrpoRecipe(GrpoRecipe):
    """GRPO with a cluster bonus and a KL on early tokens."""

    Options = DiverseGrpoOptions
    options: DiverseGrpoOptions

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """Refuse a name of no scorer, or of one that is not asked about every group."""
        name, known = (run.algorithm.model_extra or {}).get("features"), [reward.column for reward in run.rewards]
        if name is not None and name not in known:
            raise ConfigError(f"algorithm.features = {name!r} is none of the scorers: {', '.join(known)}")
        if name in [reward.column for reward in run.rewards if reward.when]:
            raise ConfigError(f"algorithm.features = {name!r}: its `when` leaves groups without features; remove that")

    def rewards(self, batch: GroupBatch) -> Tensor:
        """GRPO's rewards and the cluster bonus; a group that no scorer tells apart keeps its equal rewards."""
        rewards, options = super().rewards(batch), self.options
        features = self._features(batch)
        labels = [spectral_clusters(group, sigma=options.sigma, clusters=options.clusters) for group in features]
        sizes = torch.as_tensor(np.stack([np.bincount(row)[row] for row in labels])).to(
            rewards
        )  # [N, G], of its cluster
        told = ~silent_groups(batch.scores, batch.scorer_weights).unsqueeze(1)  # [N, 1]
        return rewards + options.bonus * (rewards.shape[1] / sizes).sqrt() * told

    def credit(self, batch: GroupBatch, reference: ReferenceOutputs, step: int) -> Credit:
        """Advantages of the rewards with the bonus; the policy term weighs all tokens alike, the KL the early ones."""
        weights = token_weights(reference.logprobs, None)
        count = batch.tokens.shape[-1]
        held = max(1, round(self.options.early * count))
        early = (torch.arange(count, device=weights.kl.device) < held) * (count / held)  # the mean over the early ones
        return Credit(self.advantages(batch), TokenWeights(weights.policy, weights.kl * early), {"weight/mean": 1.0})

    def _features(self, batch: GroupBatch) -> Tensor:
        name = self.options.features
        found = [tensor for scorer, tensor in batch.features.items() if name in (None, scorer)]
        if len(found) != 1:
            having = ", ".join(batch.features) or "none"
            raise RunError(f"algorithm.features = {name!r} must name a scorer that gives features; these do: {having}")
        return found[0]


def spectral_clusters(features: Tensor, *, sigma: float, clusters: int | None = None) -> np.ndarray:
    """Normalised spectral clustering (Ng, Jordan and Weiss 2002) by cosine distance; the same labels every time.

    Args:
        features: float [G, F], no row all zeros.
        sigma: of the affinity ``exp(-d^2 / (2 sigma^2))``.
        clusters: how many; None: k with the greatest gap between the k-th and the next eigenvalue, G at most.

    Returns:
        int labels [G], from 0 on.

    Example:
        >>> spectral_clusters(torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]]), sigma=0.3).tolist()
        [0, 0, 1]
    """
    unit = F.normalize(features.double(), dim=-1).cpu()
    affinity = torch.exp(-(1 - unit @ unit.T).clamp(min=0).square() / (2 * sigma**2)).numpy()
    scale = 1 / np.sqrt(affinity.sum(axis=1))
    values, vectors = np.linalg.eigh(scale[:, None] * affinity * scale)  # ascending
    values, vectors = values[::-1], vectors[:, ::-1]
    count = clusters or int(np.argmax(values[:-1] - values[1:])) + 1
    rows = vectors[:, : min(count, len(values))]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
    chosen = [0]  # rows to begin with: the first, then always the one farthest from those chosen
    while len(chosen) < rows.shape[1]:
        chosen.append(int(np.linalg.norm(rows[:, None] - rows[chosen], axis=-1).min(axis=1).argmax()))
    _, labels = kmeans2(rows, rows[chosen], minit="matrix")
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[labels]  # numbered in the order of their first images
