"""Importance ratios of tokens that an older policy sampled, and how far one may weigh.

The *importance ratio* of a token, its probability now over that recorded when it was drawn, weighs it: gradient
``A * ratio * grad log p``. It is taken token by token, as in PPO: that the tokens before came from the older policy too
is not corrected for, a small error while few versions lie between. A token of the learner's own version has a ratio of
exactly 1, which no correction here changes.

*Which ratio*, where tokens are drawn under guidance, from ``u + w (c - u)`` of conditional and unconditional logits:

* ``conditional``: ``p_new(a | c) / p_old(a | c)``, of the branch that STAGE trains: a trust region, at no cost. It is
  not the true sampling ratio, because the tokens came from the guided distribution.
* ``guided``: the ratio of what was truly sampled from, temperature, top-k and top-p included, and so unbiased token for
  token. It needs the unconditional branch under the current policy, about twice the forward cost, and guidance
  magnifies what engine and learner differ by, up to ``2 w - 1`` times. It is a weight only: the gradient stays that of
  the conditional log-probability, as it is for fresh tokens.

*What is done with a ratio* that is far from 1 (one such token could outweigh all others):

* ``none``: nothing.
* ``truncate``: the weight is ``min(ratio, cap)``, a constant times ``grad log p``, so a capped token still pulls
  (truncated importance sampling: Ionides 2008; in actor-learner systems IMPALA, arXiv 1802.01561).
* ``mask``: outside ``low..high`` the weight is 0 (IcePop, arXiv 2510.18855).
* PPO's pessimistic clip (arXiv 1707.06347; with stale groups AReaL, arXiv 2505.24298) goes on top of any of these.

None of them changes the normalisers, sums over whole groups that are fixed before anything is cut: a masked token adds
0 to the policy term and stays in its divisor. Other tokens' weights do not grow, and the KL is unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Correction:
    """What is done with ratios far from 1; the default does nothing.

    Invariant: ``low < 1 < high`` and ``cap >= 1``, so a token of the learner's own version is never touched.

    Attributes:
        kind: see the head of this file.
        cap: of ``truncate``.
        low, high: of ``mask``; both ends are kept.
    """

    kind: Literal["none", "truncate", "mask"] = "none"
    cap: float = 2.0
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        if not (0 <= self.low < 1 < self.high and self.cap >= 1):
            raise ValueError(f"a correction needs 0 <= low < 1 < high and cap >= 1, not {self}")


def guided_behavior(logprobs: Tensor, guided_logprobs: Tensor, recorded_guided_logprobs: Tensor) -> Tensor:
    """The behaviour log-probability against which ``logprobs`` has the ratio of the *guided* probabilities.

    Everything that takes a behaviour log-probability thereby works with either ratio.

    Args:
        logprobs: float, any shape, nats, conditional branch.
        guided_logprobs: the same shape, under the current guided distribution; minus infinity where its top-k or top-p
            leaves the token out, which gives a ratio of 0.
        recorded_guided_logprobs: the same shape, recorded when the tokens were drawn; finite.

    Returns:
        float, the same shape, without gradient.
    """
    return (logprobs - (guided_logprobs - recorded_guided_logprobs)).detach()


def beyond(logprobs: Tensor, behavior_logprobs: Tensor, correction: Correction) -> Tensor:
    """Which tokens a correction caps or masks: bool, the shape of ``logprobs`` (float, nats; behaviour alike)."""
    log_ratio = (logprobs - behavior_logprobs).detach()  # decides only, carries no gradient
    if correction.kind == "truncate":
        return log_ratio > math.log(correction.cap)
    if correction.kind == "mask":
        low = math.log(correction.low) if correction.low > 0 else -math.inf  # log 0 is an error in Python
        return (log_ratio < low) | (log_ratio > math.log(correction.high))
    return torch.zeros_like(log_ratio, dtype=torch.bool)


def corrected_ratio(logprobs: Tensor, behavior_logprobs: Tensor | None, correction: Correction) -> Tensor:
    """The ratio ``exp(logp - sg[behaviour logp])`` as it weighs a token: capped, or 0 where masked.

    Worked out in logarithms, so a ratio too great for a float is capped or masked like any other.

    Args:
        logprobs: float, any shape, nats, with gradient.
        behavior_logprobs: the same shape, recorded when the tokens were drawn; None: ``logprobs`` (ratio exactly 1).

    Returns:
        float, the same shape, >= 0; its gradient is itself, as a constant, times ``grad logp``.

    Example:
        >>> now, then = torch.tensor([0.9, 0.5, 0.1]).log(), torch.tensor([0.3, 0.5, 0.5]).log()
        >>> corrected_ratio(now, then, Correction("truncate", cap=2.0)).mul(1e4).round().tolist()
        [20000.0, 10000.0, 2000.0]
        >>> corrected_ratio(now, then, Correction("mask")).tolist()
        [0.0, 1.0, 0.0]
    """
    if correction.kind == "none" or behavior_logprobs is None:
        return torch.exp(logprobs - (logprobs if behavior_logprobs is None else behavior_logprobs).detach())
    log_ratio = (logprobs - behavior_logprobs).detach()
    if correction.kind == "truncate":
        log_ratio = log_ratio.clamp(max=math.log(correction.cap))  # before exp, which could overflow
    else:
        log_ratio = log_ratio.masked_fill(beyond(logprobs, behavior_logprobs, correction), -math.inf)
    return torch.exp(logprobs - logprobs.detach() + log_ratio)  # the difference is 0 and carries the gradient


def surrogate(
    logprobs: Tensor,
    behavior_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    clip: float | None = None,
    correction: Correction | None = None,
) -> Tensor:
    """What each token adds to the objective before STAGE's weights: ``A * ratio``, corrected, then clipped.

    The clip is PPO's ``min(A * ratio, A * clip(ratio, 1 - clip, 1 + clip))`` (arXiv 1707.06347, equation 7): no
    gradient where the ratio has already moved beyond it in the direction that the advantage wants.

    Args:
        logprobs, behavior_logprobs: as in `corrected_ratio`.
        advantages: float, a shape that broadcasts to theirs.
        clip, correction: None is off.

    Returns:
        float, the shape of ``logprobs``; exactly 0, value and gradient, for a masked token.
    """
    correction = correction or Correction()
    ratio = corrected_ratio(logprobs, behavior_logprobs, correction)
    terms = advantages * ratio
    if clip is not None:
        terms = torch.minimum(terms, advantages * ratio.clamp(1.0 - clip, 1.0 + clip))
    if correction.kind == "mask" and behavior_logprobs is not None:
        # The clip would lift a masked ratio of 0 to 1 - clip.
        terms = terms.masked_fill(beyond(logprobs, behavior_logprobs, correction), 0.0)
    return terms


def effective_sample_size(weights: Tensor) -> Tensor:
    """``(sum w)^2 / (n sum w^2)``: the share of n weighted samples that as many equally weighted ones are worth.

    Kong, Liu and Wong 1994, divided by n. 1 where all weights are alike, 1/n where one carries everything, 0 where all
    are 0; 1 of no samples at all. ``weights`` are float of any shape, >= 0; the share is a scalar float64.

    Example:
        >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0])).item()
        0.5
    """
    if weights.numel() == 0:
        return torch.ones((), dtype=torch.float64, device=weights.device)
    weights = weights.double()  # squares of great ratios
    squares = weights.square().sum()
    return torch.where(squares > 0, weights.sum().square() / (weights.numel() * squares), torch.zeros_like(squares))
