"""How a token is drawn: from the distribution of a token rule, with noise from (seed, position, token id) alone.

Both engines call `sample`, so one seed gives one image whatever else is in the batch and whichever engine ran it, up to
floating-point differences of the logits. Pure functions of tensors; nothing here keeps state. What is done to
logits before the noise lies in `stage_ray.samplers`, for the learner does it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stage_ray.policies.logprobs import token_logprobs
from stage_ray.samplers import Context, SamplingParams, process_logits

# SplitMix64 (Steele, Lea, Flood 2014): state += GOLDEN, then a two-multiply finaliser. As signed 64-bit integers.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
LARGEST_UNIFORM = 1 - 2.0**-24


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens that were drawn, and what was recorded about each (nats): [B], one of each image, or [B, T], all of them.

    Attributes:
        tokens: int64; the rest are float32.
        logprobs, entropy: of the conditional branch at temperature 1.
        guided_logprobs, guided_entropy: of the distribution that the tokens were drawn from.
    """

    tokens: Tensor
    logprobs: Tensor
    guided_logprobs: Tensor
    entropy: Tensor
    guided_entropy: Tensor


def sample(
    conditional: Tensor,
    unconditional: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    params: SamplingParams,
    sequences: Tensor | None = None,
    guided: Tensor | None = None,
) -> Sample:
    """Draw the token at ``positions`` of the images with these ``seeds``, int64 [B] each.

    Args:
        conditional: logits [B, V], any float dtype.
        unconditional: likewise; None where ``params.guided`` is False.
        sequences: int64 [B, T], the tokens before ``positions``, for rules and schedules that read them (`Context`).
        guided: bool [B], False for images without guidance; their unconditional logits are not looked at.

    Raises:
        ValueError: of `process_logits`.
    """
    conditional = conditional.float()
    context = None if sequences is None else Context(positions, sequences, guided)
    logits = process_logits(conditional, unconditional, params, context)
    tokens = (logits + gumbel(seeds, positions, logits.shape[-1])).argmax(dim=-1)  # the Gumbel-max trick
    statistics = token_logprobs(conditional, tokens)
    # Plain sampling draws from the conditional branch itself.
    sampled = statistics if params.plain else token_logprobs(logits, tokens)
    return Sample(tokens, statistics.logprobs, sampled.logprobs, statistics.entropy, sampled.entropy)


def gumbel(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise, float32 [B, V], a function of (seed, position, token id): the argmax of logits + noise is
    a sample of their softmax. The logarithms may differ by a rounding between CPU and GPU, the bits under them never.
    """
    return uniform(seeds, positions, vocabulary).neg_().log1p_().neg_().log_().neg_()  # -log(-log(1 - u))


def uniform(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Uniform numbers in (0, 1), float32 [B, V]: number v is output v of a SplitMix64 stream keyed by (seed, position).

    Small values, which decide the draw, keep float32's full relative precision down to 2**-33.
    """
    keys = _mix(_mix(seeds.clone()) + positions * GOLDEN)  # [B]
    steps = torch.arange(1, vocabulary + 1, dtype=torch.int64, device=seeds.device) * GOLDEN  # [V]
    bits = _mix(keys.unsqueeze(-1) + steps).bitwise_right_shift_(32).bitwise_and_(0xFFFFFFFF)  # [B, V], upper half
    return bits.float().add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_UNIFORM)  # never 0 or 1


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, in place, which wraps as unsigned does; the masks make shifts logical."""
    high = torch.empty_like(state)
    for shift, multiplier in zip((30, 27, 31), (*MULTIPLIERS, 1), strict=True):  # the last one has no product
        torch.bitwise_right_shift(state, shift, out=high)
        state.bitwise_xor_(high.bitwise_and_((1 << (64 - shift)) - 1)).mul_(multiplier)
    return state
