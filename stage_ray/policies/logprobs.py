"""Log-probabilities and entropies of tokens, from logits or from the states below a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stage_ray.algorithm.divergence import Divergence, exact_divergence

Head = Callable[[Tensor], Tensor]
CACHED = 2**18  # float32 logits that one operator after the other works on: 1 MiB, which a core's cache holds
LOWEST = -1e3  # in place of minus infinity, which times a probability of 0 is NaN; exp(-1e3) is 0 in float32


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Teacher-forced statistics of image tokens, in nats: float32 [B, T] each.

    Attributes:
        logprobs, entropy: under the conditional branch at temperature 1.
        guided_logprobs: under the distribution that tokens are sampled from; only where it was asked for.
        divergence: from another policy's conditional branch, over the whole vocabulary; only where it was asked for.
    """

    logprobs: Tensor
    entropy: Tensor
    guided_logprobs: Tensor | None = None
    divergence: Tensor | None = None


def token_logprobs(logits: Tensor, tokens: Tensor) -> TokenLogprobs:
    """Statistics of tokens under ``softmax(logits)``, in nats, computed in float32.

    Args:
        logits: any float dtype [..., V]; minus infinity marks an impossible token.
        tokens: int64 [...], ids 0..V-1.

    Returns:
        log p and entropy ``-sum p log p``, float32 [...]; both differentiable in ``logits``.
    """
    logp = torch.log_softmax(logits.float(), dim=-1)
    chosen = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # [...]
    entropy = -(logp.exp() * logp.clamp(min=LOWEST)).sum(dim=-1)
    return TokenLogprobs(chosen, entropy)


def chunked_logprobs(
    states: Tensor, tokens: Tensor, head: Head, *, rows: int = 256, entropy_grad: bool = False
) -> TokenLogprobs:
    """`token_logprobs` of ``head(states)``, made and dropped some tokens at a time.

    Where only the states are trained, as below a frozen head, the gradient of each token's log-probability is taken
    while its logits are there: the backward pass needs neither them nor the head again. Where the head itself or the
    entropy wants a gradient, the logits are made again in the backward pass.

    Args:
        states: any float dtype [..., S] or [..., K, S], one or several states a token.
        tokens: int64 [...], ids 0..V-1.
        head: float32 states [rows, S] or [rows, K, S] to float logits [rows, V], each row by itself. It runs outside
            of autocast; a module, or any function, whose own parameters get gradients if they require them.
        rows: tokens whose logits are held at once.
        entropy_grad: whether the entropy carries a gradient; it costs a second run of the head.

    Returns:
        float32 [...] each.
    """
    flat, gradients = states.reshape(tokens.numel(), *states.shape[tokens.dim() :]), torch.is_grad_enabled()
    with torch.autocast(states.device.type, enabled=False):  # also of the products that make the states' gradients
        # One row of constant states tells whether the head itself is trained, whatever function it is.
        if gradients and (entropy_grad or head(flat[:1].detach().float()).requires_grad):
            chunks = zip(flat.split(rows), tokens.flatten().split(rows), strict=True)  # the last one may be shorter
            parts = [checkpoint(_recomputed, *chunk, head, entropy_grad, use_reentrant=False) for chunk in chunks]
            logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))  # [tokens] each
        else:
            wanted = gradients and flat.requires_grad
            logprobs, entropy = _StatesOnly.apply(flat, tokens.flatten(), head, rows, wanted)
    return TokenLogprobs(logprobs.view(tokens.shape), entropy.view(tokens.shape))


def chunked_divergence(
    states: Tensor, reference_states: Tensor, heads: tuple[Head, Head], kind: Divergence, *, rows: int = 256
) -> Tensor:
    """`exact_divergence` of two models at each token, made some tokens at a time, forward and backward.

    Args:
        states: any float dtype [..., S], of the policy, with gradient; ``reference_states`` alike, without.
        heads: of the policy and of the reference, as in `chunked_logprobs`.
        rows: tokens whose logits are held at once, twice.

    Returns:
        float32 [...], nats.
    """
    pairs = zip(states.flatten(0, -2).split(rows), reference_states.flatten(0, -2).split(rows), strict=True)

    def divergence(mine: Tensor, theirs: Tensor) -> Tensor:
        logits = (head(part.float()) for head, part in zip(heads, (mine, theirs), strict=True))
        logp, logq = (each.log_softmax(-1).clamp(min=LOWEST) for each in logits)
        return exact_divergence(logp, logq.detach(), kind)

    with torch.autocast(states.device.type, enabled=False):
        parts = [checkpoint(divergence, *pair, use_reentrant=False) for pair in pairs]
    return torch.cat(parts).view(states.shape[:-1])


def _recomputed(states: Tensor, tokens: Tensor, head: Head, entropy_grad: bool) -> tuple[Tensor, Tensor]:
    statistics = token_logprobs(head(states.float()), tokens)
    return statistics.logprobs, statistics.entropy if entropy_grad else statistics.entropy.detach()


class _StatesOnly(torch.autograd.Function):
    """Statistics whose log-probabilities have a gradient in the states alone; keeps one vector a state, no logits."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, tokens: Tensor, head: Head, rows: int, wanted: bool) -> tuple[Tensor, Tensor]:
        logprobs = states.new_empty(tokens.shape, dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        slopes = torch.empty_like(states, dtype=torch.float32) if wanted else None  # d log p / d state
        for start in range(0, len(tokens), rows):
            part = slice(start, start + rows)
            with torch.set_grad_enabled(wanted):
                leaf = states[part].detach().float().requires_grad_(wanted)
                logits = head(leaf)
            made, slope = logits.detach(), torch.empty_like(logits) if wanted else None
            step = max(1, CACHED // logits.shape[-1])
            for first in range(0, len(made), step):
                some, those = slice(first, first + step), slice(start + first, start + min(first + step, len(made)))
                chosen = tokens[those].unsqueeze(-1)
                logp = torch.log_softmax(made[some].float(), dim=-1)  # [step, V]
                logprobs[those] = logp.gather(-1, chosen).squeeze(-1)
                p = logp.exp()
                entropy[those] = -logp.clamp_(min=LOWEST).mul_(p).sum(dim=-1)  # in place: p is made already
                if slope is not None:  # onehot - p
                    slope[some] = p.neg_().scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=p.dtype))
            if slopes is not None:
                (slopes[part],) = torch.autograd.grad(logits, leaf, slope)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        # In float32: autograd rounds to the states' dtype where they are narrower.
        return slopes * gradient.view(-1, *[1] * (slopes.dim() - 1)), None, None, None, None
