"""Distances of two next-token distributions, exactly over the vocabulary or by a token drawn from one of them.

An f-divergence of the policy p from the reference q is ``D = E_p[f(r)]`` with ``r = q / p`` and f convex, ``f(1) = 0``.
Adding a multiple of ``r - 1`` to f changes nothing in D, since ``E_p[r] = 1``; here it makes ``f'(1) = 0``, and so
``f(r) >= 0``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["policy_reference", "reference_policy", "jensen_shannon"]


def exact_divergence(logp: Tensor, logq: Tensor, kind: Divergence) -> Tensor:
    """The divergence of whole distributions, in nats.

    Args:
        logp: float [..., V], log-probabilities of the policy, with gradient.
        logq: float [..., V], of the reference.
        kind: ``policy_reference`` KL(p || q); ``reference_policy`` KL(q || p); ``jensen_shannon``.

    Returns:
        float [...], >= 0 up to rounding.
    """
    if kind == "policy_reference":
        return (logp.exp() * (logp - logq)).sum(dim=-1)
    if kind == "reference_policy":
        return (logq.exp() * (logq - logp)).sum(dim=-1)
    middle = torch.logaddexp(logp, logq) - math.log(2)
    return 0.5 * ((logp.exp() * (logp - middle)).sum(dim=-1) + (logq.exp() * (logq - middle)).sum(dim=-1))


def estimated_divergence(logprobs: Tensor, reference_logprobs: Tensor, kind: Divergence) -> Tensor:
    """Estimates by tokens that the policy drew: unbiased in value and, other than a differentiated k3, in gradient.

    The value is ``f(r) >= 0``. The gradient is ``(f(r) - r f'(r)) grad log p``, shifted by the constant that makes it 0
    at ``r = 1``, which changes no mean and lowers the noise.

    Args:
        logprobs: float, any shape, log p of the drawn tokens, nats, with gradient.
        reference_logprobs: the same shape, log q.

    Example:
        >>> estimated_divergence(torch.zeros(2), torch.tensor([0.0, 1.0]), "policy_reference").mul(1e4).round().tolist()
        [0.0, 7183.0]
    """
    log_r = (reference_logprobs - logprobs).detach()
    if kind == "policy_reference":  # f = -log r + r - 1
        value, slope = torch.expm1(log_r) - log_r, -log_r
    elif kind == "reference_policy":  # f = r log r - r + 1
        value, slope = log_r.exp() * log_r - torch.expm1(log_r), -torch.expm1(log_r)
    else:  # f = (r log r - (1 + r) log((1 + r) / 2)) / 2
        middle = torch.nn.functional.softplus(log_r) - math.log(2)  # log((1 + r) / 2)
        value, slope = 0.5 * (log_r.exp() * (log_r - middle) - middle), -0.5 * middle
    return value + slope * (logprobs - logprobs.detach())
