"""Log-probability and entropy of tokens from logits: one pure function that engines, learner and policies share."""

from __future__ import annotations

import torch
from torch import Tensor

from stage_ray.policies.base import TokenStatistics


def token_statistics(logits: Tensor, tokens: Tensor) -> TokenStatistics:
    """Statistics of tokens under ``softmax(logits)``, in nats, computed in float32.

    Args:
        logits: any float dtype [..., V]; minus infinity marks an impossible token.
        tokens: int64 [...], ids 0..V-1.

    Returns:
        log p and entropy ``-sum p log p``, float32 [...]; both differentiable in ``logits``.
    """
    logp = torch.log_softmax(logits.float(), dim=-1)
    chosen = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    # A token of probability 0 adds 0 to the entropy; -inf * 0 would add NaN.
    entropy = -(logp.exp() * logp.clamp(min=torch.finfo(torch.float32).min)).sum(dim=-1)
    return TokenStatistics(chosen, entropy)
