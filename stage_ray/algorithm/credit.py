"""STAGE's credit: scores of whole groups to rewards, advantages and similarities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stage_ray.algorithm.advantages import combine_rewards, group_advantages, informative_scorers
from stage_ray.algorithm.entropy import entropy_reward
from stage_ray.algorithm.similarity import opposite_sign_similarity


@dataclass(frozen=True, slots=True)
class StageCredit:
    """Everything the loss takes from rewards; no gradient anywhere.

    Attributes:
        rewards: float [N, G], combined scores, entropy reward added where it is on.
        advantages: float [N, G].
        similarity: float [N, G, T]; a loss without reweighting does not look at it.
        informative: bool [N, R], the scorers that told the images of a group apart.
    """

    rewards: Tensor
    advantages: Tensor
    similarity: Tensor
    informative: Tensor


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
    entropy_weight: float = 0.4,
    entropy_best_only: bool = True,
    eps: float = 1e-4,
) -> StageCredit:
    """Scores to advantages and similarities, in the order of the published training step.

    Without the entropy reward, a group in which no scorer tells the images apart has advantages of 0 and, as in the
    published code, a similarity of 1 everywhere: its policy term vanishes and its KL counts in full.

    Args:
        scores: float [N, G, R], finite.
        policy_entropy: float [N, G], mean token entropy of each image, nats; ``reference_entropy`` alike.
        tokens: int64 [N, G, T].
        codebook: float [V, D].
        weights: float [R], of the scorers.
        entropy_weight: of the entropy reward; 0 is off.

    Raises:
        ValueError: shapes that do not fit, or a score that is not finite.

    Example:
        >>> still, book = torch.zeros(1, 2), torch.eye(2)
        >>> scores, tokens = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0], [1]]])
        >>> stage_credit(scores, still, still, tokens, book).similarity.flatten().tolist()
        [0.0, 0.0]
    """
    informative = informative_scorers(scores)
    rewards = combine_rewards(scores, weights=weights, drop_constant=drop_constant)
    if entropy_weight > 0:
        bonus = entropy_reward(policy_entropy, reference_entropy, rewards, best_only=entropy_best_only)
        rewards = rewards + entropy_weight * bonus  # before normalising, so it changes mean and std too
    advantages = group_advantages(rewards, eps=eps)
    similarity = opposite_sign_similarity(tokens, codebook, advantages)
    if entropy_weight == 0:  # with the entropy reward such a group still has advantages
        silent = ~informative.any(dim=1)  # [N]
        similarity = similarity.masked_fill(silent[:, None, None], 1.0)  # policy weight 0, KL weight 1
    return StageCredit(rewards, advantages, similarity, informative)
