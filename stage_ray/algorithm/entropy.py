"""STAGE's entropy reward: a small bonus for staying as uncertain as the reference model."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_closeness(policy_entropy: Tensor, reference_entropy: Tensor) -> Tensor:
    """``e = 1 / (1 + (H_ref - H)^2)``: 1 where both entropies agree, towards 0 as they part. Same shape as the inputs.

    Example:
        >>> entropy_closeness(torch.tensor([2.0, 3.0]), torch.tensor([2.0, 2.0])).tolist()
        [1.0, 0.5]
    """
    return 1.0 / (1.0 + (reference_entropy - policy_entropy).square())


def entropy_reward(
    policy_entropy: Tensor, reference_entropy: Tensor, rewards: Tensor, *, best_only: bool = True
) -> Tensor:
    """Closeness of an image's mean token entropy to the reference model's, centred over the images it applies to.

    Added to the rewards by the caller (times 0.4 in the paper's GenEval run). It is a reward, not a loss term: no
    gradient flows through an entropy. With ``best_only`` it goes to the images that share the group's best reward, so
    it orders the winners and never lifts a loser; a single best image gets 0. In a group without any variance every
    image is a best one, and the entropy alone decides.

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
