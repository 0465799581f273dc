"""How far a policy has moved from its reference, exactly over the vocabulary, at every token of some images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stage_ray.algorithm.divergence import exact_divergence
from stage_ray.policies.base import LOGITS_AT_ONCE, Policy
from stage_ray.policies.codec import PromptIds
from stage_ray.policies.logprobs import LOWEST
from stage_ray.samplers import Context, SamplingParams, process_logits

FORWARD, BACKWARD, ENTROPY = range(3)
"""Columns of `token_drift`, of the conditional distribution and then of the one that is sampled."""


@torch.no_grad()
def token_drift(
    policy: Policy,
    reference: Policy,
    prompts: Sequence[PromptIds],
    tokens: Tensor,
    params: SamplingParams,
    bfloat16: tuple[bool, bool] = (False, False),
) -> Tensor:
    """KL(policy || reference), KL(reference || policy), and entropy of the policy less the reference's, in nats.

    Teacher-forced: a forward of each model a branch. All as they are now; a `Policy` may be sharded.

    Args:
        prompts: one an image.
        tokens: int64 [B, T].
        params: what tokens are sampled by. Where that is the conditional distribution itself, or leaves tokens out
            (top-k, top-p), which makes a KL infinite, the second three columns are missing.
        bfloat16: whether the policy's backbone, and the reference's, compute in it. Where they differ, so do equal
            models, by rounding.

    Returns:
        float32 [B, T, 3 or 6].
    """
    guided = not params.plain and not params.top_k and params.top_p == 1.0
    sides = ["conditional"] + ["unconditional"] * (guided and params.guided)
    branches = [[getattr(prompt, side) for prompt in prompts] for side in sides]
    states = []  # of each model, [B * T, K, hidden]
    for model, narrow in zip((policy, reference), bfloat16, strict=True):
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=narrow):
            found = [model.hidden_states(branch, tokens) for branch in branches]
        states.append(torch.stack(found, dim=2).flatten(0, 1))
    rows = max(1, LOGITS_AT_ONCE // (2 * len(sides) * policy.codebook_size))
    index, columns = torch.arange(tokens.numel(), device=tokens.device), []
    with torch.autocast(tokens.device.type, enabled=False):
        for which, mine, theirs in zip(index.split(rows), *(of.split(rows) for of in states), strict=True):
            context = Context(which % tokens.shape[1], tokens[which // tokens.shape[1]])
            logits = policy.head(mine.float()), reference.head(theirs.float())  # [rows, K, V] each
            columns.append(torch.stack(list(_columns(*logits, params, context, guided)), dim=-1))
    return torch.cat(columns).view(*tokens.shape, -1)


def _columns(mine: Tensor, theirs: Tensor, params: SamplingParams, context: Context, guided: bool) -> Iterator[Tensor]:
    """Float32 [rows] each, from logits [rows, K, V]."""
    pairs = [(mine[:, 0].float(), theirs[:, 0].float())]
    if guided:
        pairs.append(
            tuple(
                process_logits(it[:, 0], it[:, 1] if params.guided else None, params, context) for it in (mine, theirs)
            )  # type: ignore[arg-type]
        )
    for pair in pairs:
        logp, logq = (logits.log_softmax(-1).clamp(min=LOWEST) for logits in pair)
        yield exact_divergence(logp, logq, "policy_reference")
        yield exact_divergence(logp, logq, "reference_policy")
        yield (logq.exp() * logq).sum(-1) - (logp.exp() * logp).sum(-1)
