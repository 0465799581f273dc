"""STAGE's credit: scores of whole groups to rewards (entropy reward included), advantages and similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from stage_ray.algorithm.advantages import combine_rewards, group_advantages, silent_groups
from stage_ray.algorithm.similarity import opposite_sign_similarity


def entropy_closeness(policy_entropy: Tensor, reference_entropy: Tensor) -> Tensor:
    """``e = 1 / (1 + (H_ref - H)^2)``: 1 where both entropies agree, towards 0 as they part. Of any shape."""
    return 1.0 / (1.0 + (reference_entropy - policy_entropy).square())


def entropy_reward(
    policy_entropy: Tensor, reference_entropy: Tensor, rewards: Tensor, *, best_only: bool = True
) -> Tensor:
    """Closeness of an image's mean token entropy to the reference model's, centred over the images it applies to.

    Added to the rewards by the caller (times 0.4 in the paper's GenEval run). It is a reward, not a loss term: no
    gradient flows through an entropy. With ``best_only`` it goes to the images that share the group's best reward, so
    it orders the winners and never lifts a loser. In a group without any variance every image is a best one.

    Args:
        policy_entropy: float [N, G], nats, mean over an image's tokens, conditional branch.
        reference_entropy: float [N, G], the same tokens under the reference model.
        rewards: float [N, G], combined rewards.
        best_only: apply to the best images of a group only (the published code), or to all.

    Returns:
        float [N, G]; 0 where it does not apply; each row sums to 0 up to rounding.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> even = torch.tensor([[2.0, 3.0, 2.0]])
        >>> entropy_reward(even, torch.full((1, 3), 2.0), torch.tensor([[1.0, 1.0, 0.0]])).tolist()
        [[0.25, -0.25, 0.0]]
    """
    if not policy_entropy.shape == reference_entropy.shape == rewards.shape:
        shapes = [list(t.shape) for t in (policy_entropy, reference_entropy, rewards)]
        raise ValueError(f"policy_entropy, reference_entropy and rewards must all be [N, G], not {shapes}")
    with torch.no_grad():
        closeness = entropy_closeness(policy_entropy, reference_entropy)
        best = rewards == rewards.amax(dim=1, keepdim=True)  # [N, G]; ties are all best
        applies = (best if best_only else torch.ones_like(best)).to(closeness.dtype)
        mean = (closeness * applies).sum(dim=1, keepdim=True) / applies.sum(dim=1, keepdim=True)
        return (closeness - mean) * applies  # so the reward of a group stays the same in sum


@torch.no_grad()
def stage_credit(
    scores: Tensor,
    policy_entropy: Tensor,
    reference_entropy: Tensor,
    tokens: Tensor,
    codebook: Tensor,
    *,
    weights: Tensor | None = None,
    drop_constant: bool = True,
    zscore: bool = False,
    entropy_weight: float = 0.4,
    entropy_best_only: bool = True,
    progress: float | None = None,
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Scores to advantages and similarities, in the order of the published training step.

    Without the entropy reward, a group in which no scorer tells the images apart has advantages of 0 and, as in the
    published code, a similarity of 1 everywhere: its policy term vanishes and its KL counts in full.

    Args:
        scores: float [N, G, R], finite.
        policy_entropy: float [N, G], mean token entropy of each image, nats; ``reference_entropy`` alike.
        tokens: int64 [N, G, T].
        codebook: float [V, D].
        weights: float [R], of the scorers; ``drop_constant``, ``zscore``, ``progress``: as `combine_rewards` has them.
        entropy_weight: of the entropy reward; 0 is off.

    Returns:
        Advantages, float [N, G], and similarities, float [N, G, T], without gradient.

    Raises:
        ValueError: shapes that do not fit, or a score that is not finite.
    """
    rewards = combine_rewards(scores, weights=weights, drop_constant=drop_constant, zscore=zscore, progress=progress)
    if entropy_weight > 0:
        bonus = entropy_reward(policy_entropy, reference_entropy, rewards, best_only=entropy_best_only)
        rewards = rewards + entropy_weight * bonus  # before normalising, so it changes mean and std too
    advantages = group_advantages(rewards, eps=eps)
    similarity = opposite_sign_similarity(tokens, codebook, advantages)
    if entropy_weight == 0:  # with the entropy reward such a group still has advantages
        silent = silent_groups(scores, weights, progress)[:, None, None]  # [N, 1, 1]
        similarity = similarity.masked_fill(silent, 1.0)  # policy weight 0, KL weight 1
    return advantages, similarity
