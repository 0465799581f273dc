"""Scores of several scorers to one reward, and rewards to advantages inside each group."""

from __future__ import annotations

import torch
from torch import Tensor

from stage_ray.records import CONSTANT_STD

ZSCORE_EPS = 1e-8  # of Pref-GRPO's z-scores


def informative_scorers(scores: Tensor, weights: Tensor | None = None) -> Tensor:
    """Which scorers tell a group's images apart.

    Args:
        scores: float [N, G, R], G >= 2, finite.
        weights: float [R]; a scorer of weight 0 is only watched and tells nothing.

    Returns:
        bool [N, R], True where the unbiased standard deviation over the group exceeds 1e-6.

    Raises:
        ValueError: wrong shape, fewer than two images, or a score that is not finite.
    """
    if scores.dim() != 3 or scores.shape[1] < 2:
        raise ValueError(f"scores must be [N, G, R] with at least 2 images a group, not {list(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores hold a value that is not finite; a failed score must be made again, not trained on")
    telling = scores.std(dim=1) > CONSTANT_STD  # [N, R], unbiased
    return telling if weights is None else telling & (weights != 0)


def promising_scorers(scores: Tensor, progress: float) -> Tensor:
    """Which scorers a group may be trained on so early: its images must not be too bad yet.

    ``max_i s_ik > 0.5 (1 - 2p)`` and ``mean_i s_ik >= 0.3 (1 - 2p)`` with ``p`` the share of the training that is done.
    Both bounds fall to 0 in its first half, so no scorer with scores from 0 on is left out after it.

    Args:
        scores: float [N, G, R].
        progress: ``p``, 0 to 1.

    Returns:
        bool [N, R].

    Example:
        >>> scores = torch.tensor([[[0.9], [0.1]], [[0.4], [0.4]]])
        >>> [promising_scorers(scores, progress).flatten().tolist() for progress in (0.0, 0.25)]
        [[True, False], [True, True]]
    """
    remaining = 1.0 - 2.0 * progress
    return (scores.amax(dim=1) > 0.5 * remaining) & (scores.mean(dim=1) >= 0.3 * remaining)


def silent_groups(scores: Tensor, weights: Tensor | None = None, progress: float | None = None) -> Tensor:
    """Groups that no scorer tells apart, bool [N]; with ``progress``, none of the `promising_scorers` does.

    ``weights``: as `informative_scorers` has them.

    Example:
        >>> scores = torch.tensor([[[0.5, 1.0], [0.5, 0.0]]])
        >>> [silent_groups(scores, weights).item() for weights in (None, torch.tensor([1.0, 0.0]))]
        [False, True]
    """
    telling = informative_scorers(scores, weights)  # [N, R]
    if progress is not None:
        telling &= promising_scorers(scores, progress)
    return ~telling.any(dim=1)


def combine_rewards(
    scores: Tensor,
    *,
    weights: Tensor | None = None,
    drop_constant: bool = False,
    zscore: bool = False,
    progress: float | None = None,
) -> Tensor:
    """Weighted sum of scorers, image by image.

    With ``zscore`` each scorer first becomes ``(s - mean) / (std + 1e-8)`` inside the group, so that weights alone say
    what counts, whatever a scorer's scale (Pref-GRPO, arXiv 2508.20751); a constant scorer becomes exactly 0.

    ``drop_constant`` leaves out, group by group, the scorers that gave every image the same score, as the published
    code does for its GenEval and OCR runs; a group in which none is left gets 0 everywhere. ``progress`` leaves out
    those that are no `promising_scorers`.

    Args:
        scores: float [N, G, R], finite.
        weights: float [R]; 1 each by default.
        progress: share of the training that is done, 0 to 1; None leaves no scorer out.

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
    promising = None if progress is None else promising_scorers(scores, progress)  # of scores, not of z-scores
    if zscore:
        columns = scores.transpose(1, 2)  # [N, R, G]
        scores = group_advantages(columns.flatten(0, 1), eps=ZSCORE_EPS).view_as(columns).transpose(1, 2)
    weighted = scores if weights is None else scores * weights  # [N, G, R]
    if drop_constant:
        weighted = weighted.masked_fill(~informative.unsqueeze(1), 0.0)  # for the whole group at once
    if promising is not None:
        weighted = weighted.masked_fill(~promising.unsqueeze(1), 0.0)
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
