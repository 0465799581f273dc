"""The KL estimate that holds the policy near its reference."""

from __future__ import annotations

import torch
from torch import Tensor


def k3_kl(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference): ``exp(d) - d - 1`` with ``d = logp_ref - logp`` ("k3").

    Never negative, unbiased for tokens sampled from the policy, and differentiable in ``logprobs``. Written with expm1:
    near the reference the plain form is all rounding error in float32.

    Args:
        logprobs: float, any shape, nats.
        reference_logprobs: the same shape.

    Returns:
        float, the same shape, nats.

    Example:
        >>> k3_kl(torch.zeros(2), torch.tensor([0.0, 1.0])).mul(1e4).round().tolist()
        [0.0, 7183.0]
    """
    difference = reference_logprobs - logprobs
    return torch.expm1(difference) - difference  # exp(d) - 1 - d
