"""Scores of several scorers to one reward, and rewards to advantages inside each group."""

from __future__ import annotations

import torch
from torch import Tensor

from stage_ray.records import CONSTANT_STD

ZSCORE_EPS = 1e-8  # of Pref-GRPO's z-scores


def informative_scorers(scores: Tensor) -> Tensor:
    """Which scorers tell a group's images apart.

    Args:
        scores: float [N, G, R], G >= 2, finite.

    Returns:
        bool [N, R], True where the unbiased standard deviation over the group exceeds 1e-6.

    Raises:
        ValueError: wrong shape, fewer than two images, or a score that is not finite.
    """
    if scores.dim() != 3 or scores.shape[1] < 2:
        raise ValueError(f"scores must be [N, G, R] with at least 2 images a group, not {list(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores hold a value that is not finite; a failed score must be made again, not trained on")
    return scores.std(dim=1) > CONSTANT_STD  # [N, R], unbiased


def combine_rewards(
    scores: Tensor, *, weights: Tensor | None = None, drop_constant: bool = False, zscore: bool = False
) -> Tensor:
    """Weighted sum of scorers, image by image.

    With ``zscore`` each scorer first becomes ``(s - mean) / (std + 1e-8)`` inside the group, so that weights alone say
    what counts, whatever a scorer's scale (Pref-GRPO, arXiv 2508.20751); a constant scorer becomes exactly 0.

    ``drop_constant`` leaves out, group by group, the scorers that gave every image the same score, as the published
    code does for its GenEval and OCR runs; a group in which none is left gets 0 everywhere.

    Args:
        scores: float [N, G, R], finite.
        weights: float [R]; 1 each by default.

    Returns:
        float [N, G].

    Raises:
        ValueError: of `informative_scorers`, or another number of weights.

    Example:
        >>> scores = torch.tensor([[[1.0, 0.5], [0.0, 0.5]]])
        >>> combine_rewards(scores, weights=torch.tensor([2.0, 1.0])).tolist()
        [[2.5, 0.5]]
        >>> combine_rewards(scores, drop_constant=True).tolist()
        [[1.0, 0.0]]
        >>> combine_rewards(scores * 100, zscore=True).mul(1e4).round().tolist()
        [[7071.0, -7071.0]]
    """
    informative = informative_scorers(scores)
    if weights is not None and weights.shape != scores.shape[2:]:
        raise ValueError(f"weights must be [{scores.shape[2]}], one a scorer, not {list(weights.shape)}")
    if zscore:
        columns = scores.transpose(1, 2)  # [N, R, G]
        scores = group_advantages(columns.flatten(0, 1), eps=ZSCORE_EPS).view_as(columns).transpose(1, 2)
    weighted = scores if weights is None else scores * weights  # [N, G, R]
    if drop_constant:
        weighted = weighted.masked_fill(~informative.unsqueeze(1), 0.0)  # for the whole group at once
    return weighted.sum(dim=-1)


def group_advantages(rewards: Tensor, *, eps: float = 1e-4) -> Tensor:
    """GRPO's advantage: ``A_i = (r_i - mean) / (std + eps)`` over the group, with the unbiased standard deviation.

    A group whose images all have the same reward gets exactly 0, not the rounding error of its mean: the signs of
    advantages decide which images are compared later.

    Args:
        rewards: float [N, G], G >= 2.
        eps: keeps the division finite.

    Returns:
        float [N, G]; each row sums to 0 up to rounding.

    Raises:
        ValueError: wrong shape or fewer than two images a group.

    Example:
        >>> group_advantages(torch.tensor([[1.0, 0.0], [0.3, 0.3]])).mul(1e4).round().tolist()
        [[7070.0, -7070.0], [0.0, 0.0]]
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [N, G] with at least 2 images a group, not {list(rewards.shape)}")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    constant = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # [N, 1], compared, not std == 0: that rounds
    return (centred / (rewards.std(dim=1, keepdim=True) + eps)).masked_fill(constant, 0.0)
