"""The STAGE loss, whole or in micro-batches that add up to it.

``stage_loss`` is `token_weights` followed by `weighted_loss`. The first fixes every token's weight from whole groups;
the second is a plain sum over tokens, so any cut of the images into micro-batches gives the same loss and gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stage_ray.algorithm.off_policy import Correction, surrogate
from stage_ray.algorithm.similarity import advantage_weight, kl_weight

WEIGHT_EPS = 1e-6
"""Added to a group's sum of weights, as in the published code: a group of identical images then divides 0 by this."""


def k3_kl(logprobs: Tensor, reference_logprobs: Tensor, *, ratio_cap: float | None = None) -> Tensor:
    """Per-token estimate of KL(policy || reference): ``exp(d) - d - 1`` with ``d = logp_ref - logp`` ("k3").

    Never negative, unbiased for tokens sampled from the policy, and differentiable in ``logprobs``.

    It grows as ``exp(d)``: one token that the reference likes far better than the policy outweighs all others. With
    ``ratio_cap``, ``p_ref / p`` counts for no more than that, which bounds the estimate by ``cap - 1 - log cap`` and
    its slope by ``cap - 1``. A token beyond keeps that greatest slope, not none: it is the one to be pulled back most.

    Args:
        logprobs, reference_logprobs: float, any shape, nats; the estimate has it too.
        ratio_cap: > 1; None is off, as published.

    Example:
        >>> k3_kl(torch.zeros(2), torch.tensor([0.0, 1.0])).mul(1e4).round().tolist()
        [0.0, 7183.0]
        >>> k3_kl(torch.zeros(2), torch.tensor([1.0, 89.0]), ratio_cap=2.0).mul(1e4).round().tolist()
        [3069.0, 3069.0]
    """
    difference = reference_logprobs - logprobs
    if ratio_cap is not None:
        # 0 + the cap: the difference to itself carries the gradient, as if the token were at the cap.
        at_cap = difference - difference.detach() + math.log(ratio_cap)
        difference = torch.where(difference.detach() > math.log(ratio_cap), at_cap, difference)
    return torch.expm1(difference) - difference  # near the reference, exp(d) - d - 1 is all rounding error in float32


@dataclass(frozen=True, slots=True)
class StageLoss:
    """What a loss is made of: ``loss = policy + beta * kl``. Scalars; ``policy`` and ``kl`` carry no gradient."""

    loss: Tensor
    policy: Tensor
    kl: Tensor


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """The share of each token in the loss of a whole batch: float [N, G, T] each.

    Invariants: ``policy`` sums to 1/N over a group (a little less by 1e-6; 0 where all its images agree everywhere, and
    less where shares are capped); ``kl`` is ``kappa / (N G T)``.
    """

    policy: Tensor
    kl: Tensor


def _normalised(weight: Tensor, most: float | None = None) -> Tensor:
    """Weights [N, G, T] to their shares in the batch, in which groups count alike; none above ``most`` of its group."""
    shares = weight / (weight.sum(dim=(1, 2), keepdim=True) + WEIGHT_EPS)
    return (shares if most is None else shares.clamp(max=most)) / weight.shape[0]


def token_weights(
    like: Tensor,
    similarity: Tensor | None,
    *,
    reweight_advantage: bool = True,
    reweight_kl: bool = True,
    kl_floor: float = 0.5,
    kl_slope: float = 0.5,
    most: float | None = None,
) -> TokenWeights:
    """Weights of every token, normalised over whole groups, before anything is cut into micro-batches.

    Args:
        like: any float [N, G, T]; the weights take its dtype and device.
        similarity: float [N, G, T]; None is no reweighting at all.
        reweight_advantage: similarity-aware weights of the policy term, else all tokens of a group alike.
        reweight_kl: similarity-aware weights of the KL, else 1; ``kl_floor``, ``kl_slope``: as `kl_weight` has them.
        most: greatest share of a token in its group's policy term; what is cut off goes nowhere. None is off.

    Raises:
        ValueError: ``similarity`` is not of that shape.
    """
    if similarity is not None and similarity.shape != like.shape:
        raise ValueError(f"similarity must be {list(like.shape)}, not {list(similarity.shape)}")
    policy = kappa = torch.ones_like(like)  # no reweighting
    if similarity is not None and reweight_advantage:
        policy = advantage_weight(similarity.to(like))
    if similarity is not None and reweight_kl:
        kappa = kl_weight(similarity.to(like), floor=kl_floor, slope=kl_slope)
    return TokenWeights(policy=_normalised(policy, most), kl=kappa / like.numel())


def policy_loss(
    logprobs: Tensor,
    behavior_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    weight: Tensor | None = None,
    clip: float | None = None,
    correction: Correction | None = None,
) -> Tensor:
    """The policy term: per group ``-sum(w * A * ratio) / (sum(w) + 1e-6)``, then the mean over groups.

    Args:
        logprobs: float [N, G, T], with gradient, nats.
        behavior_logprobs: float [N, G, T], of the policy that sampled; None: the policy itself (ratio exactly 1).
        advantages: float [N, G], or [N, G, T].
        weight: float [N, G, T], >= 0; all tokens alike by default.
        clip: PPO's clip of the ratio; None is off, as in the paper.
        correction: of the ratios of an older policy's tokens; None is off.

    Returns:
        scalar.

    Example:
        The paper's toy: two images of one token, rewards 1 and 0, similarity 0.6, hence weight 0.2 each.
        >>> logp = torch.full((1, 2, 1), -1.0, requires_grad=True)
        >>> loss = policy_loss(logp, None, torch.tensor([[0.707, -0.707]]), weight=torch.full((1, 2, 1), 0.2))
        >>> loss.backward()
        >>> loss.item(), [round(g, 4) for g in logp.grad.flatten().tolist()]
        (-0.0, [-0.3535, 0.3535])
    """
    shares = _normalised(torch.ones_like(logprobs) if weight is None else weight)  # [N, G, T], 1/N a group in sum
    return policy_term(logprobs, behavior_logprobs, advantages, shares, clip=clip, correction=correction)


def policy_term(
    logprobs: Tensor,
    behavior_logprobs: Tensor | None,
    advantages: Tensor,
    weight: Tensor,
    *,
    clip: float | None = None,
    correction: Correction | None = None,
) -> Tensor:
    """``-sum(w A ratio)`` over the tokens of some images: the part of `weighted_loss` that is no KL, a scalar."""
    if advantages.dim() == logprobs.dim() - 1:  # one an image, not one a token
        advantages = advantages.unsqueeze(-1)
    terms = surrogate(logprobs, behavior_logprobs, advantages, clip=clip, correction=correction)
    return -(weight * terms).sum()  # minus: the objective is maximised


def weighted_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    behavior_logprobs: Tensor | None,
    advantages: Tensor,
    weights: TokenWeights,
    *,
    beta: float,
    clip: float | None = None,
    correction: Correction | None = None,
    kl_ratio_cap: float | None = None,
) -> StageLoss:
    """The share of some images in the batch's loss, a sum over tokens.

    Args:
        logprobs: float [..., T], with gradient, nats; ``reference_logprobs`` and ``behavior_logprobs`` alike.
        advantages: float [...], one an image, or [..., T].
        weights: of the same images, cut from those of the whole batch.
        beta: weight of the KL; ``clip`` and ``correction`` as in `policy_loss`, ``kl_ratio_cap`` as in `k3_kl`.
    """
    policy = policy_term(logprobs, behavior_logprobs, advantages, weights.policy, clip=clip, correction=correction)
    kl = (weights.kl * k3_kl(logprobs, reference_logprobs, ratio_cap=kl_ratio_cap)).sum()
    return StageLoss(loss=policy + beta * kl, policy=policy.detach(), kl=kl.detach())


def stage_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    behavior_logprobs: Tensor | None,
    advantages: Tensor,
    similarity: Tensor | None,
    *,
    beta: float,
    reweight_advantage: bool = True,
    reweight_kl: bool = True,
    clip: float | None = None,
    correction: Correction | None = None,
) -> StageLoss:
    """STAGE's loss, ``-J + beta * KL``, mean over groups.

    ``J = sum(w * A * ratio) / (sum(w) + 1e-6)`` over a group with ``w`` of `advantage_weight`; the KL is the mean over
    all tokens of ``kappa * k3`` with ``kappa`` of `kl_weight`. Both switches off, or ``similarity`` None: plain GRPO.

    Args:
        logprobs: float [N, G, T], with gradient, nats; ``reference_logprobs`` alike, without.
        behavior_logprobs: float [N, G, T]; None: the policy itself (ratio exactly 1).
        advantages: float [N, G].
        similarity: float [N, G, T] of `opposite_sign_similarity`, or None.
        beta: weight of the KL; ``clip`` and ``correction`` as in `policy_loss`.

    Raises:
        ValueError: ``similarity`` has another shape than ``logprobs``.
    """
    weights = token_weights(
        logprobs.detach(), similarity, reweight_advantage=reweight_advantage, reweight_kl=reweight_kl
    )
    return weighted_loss(
        logprobs,
        reference_logprobs,
        behavior_logprobs,
        advantages,
        weights,
        beta=beta,
        clip=clip,
        correction=correction,
    )
