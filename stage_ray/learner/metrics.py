"""What one update tells about itself: flat floats, by the names and meanings of `stage_ray.observability.registry`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stage_ray.algorithm.advantages import combine_rewards, informative_scorers
from stage_ray.algorithm.credit import entropy_closeness
from stage_ray.algorithm.losses import k3_kl
from stage_ray.algorithm.off_policy import Correction, beyond, corrected_ratio, effective_sample_size
from stage_ray.config import LearnerConfig, RunConfig
from stage_ray.config.flops import forward_flops, training_flops
from stage_ray.config.model_sizes import ModelSizes
from stage_ray.learner.batch import Batch
from stage_ray.recipes.base import Credit, GroupBatch, ReferenceOutputs, correction_of


@dataclass(frozen=True, slots=True)
class UpdateOutputs:
    """The policy on a whole batch, gathered from all ranks and micro-batches.

    Attributes:
        logprobs: float32 [N, G, T], detached, nats.
        behavior: float32 [N, G, T], what ratios are taken against; ``logprobs`` themselves in fresh groups.
        sums: ``loss`` and the recipe's parts of it, of the whole batch.
    """

    logprobs: Tensor
    behavior: Tensor
    sums: dict[str, float]


def update_metrics(
    batch: GroupBatch, reference: ReferenceOutputs, credit: Credit, outputs: UpdateOutputs, run: RunConfig
) -> dict[str, float]:
    """Metrics of one update: those of every recipe, then the recipe's own (`Credit.metrics` and `Objective.parts`).

    ``mismatch/abs_logprob`` is absent where every group is older than the learner, ``mismatch/with_drift_abs_logprob``
    where none is, ``mismatch/moved_abs_logprob`` without moved prompts, ``reward/<scorer>`` where the scorer was asked
    about no group.
    """
    asked = torch.as_tensor(np.stack([scored.asked for scored in batch.scored]), device=batch.scores.device)  # [N, R]
    rewards = combine_rewards(batch.scores, weights=batch.scorer_weights)  # as given: no scorer dropped, nothing added
    zero = (credit.advantages == 0).flatten(1).all(dim=1)  # [N]
    kl = k3_kl(outputs.logprobs, reference.logprobs)
    capped = k3_kl(outputs.logprobs, reference.logprobs, ratio_cap=run.algorithm.kl_ratio_cap)
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(dim=1).mean().item(),
        "reward/informative": informative_scorers(batch.scores)[asked].float().mean().item(),
        "advantage/mean_abs": credit.advantages.abs().mean().item(),
        "advantage/zero_groups": zero.float().mean().item(),
        "entropy_reward/mean": entropy_closeness(batch.entropy.mean(-1), reference.entropy.mean(-1)).mean().item(),
        "entropy/policy": batch.entropy.mean().item(),
        "entropy/reference": reference.entropy.mean().item(),
        "kl": kl.mean().item(),
        "kl/max": kl.max().item(),
        "kl/weighted": (credit.weights.kl * capped).sum().item(),
        "staleness/mean": batch.staleness.float().mean().item(),
        "staleness/max": float(batch.staleness.max().item()),
        "rollout/unguided": 1 - batch.guided.float().mean().item(),
        "images": float(batch.tokens.shape[0] * batch.tokens.shape[1]),
        "tokens": float(batch.tokens.numel()),
    }
    for column, name in enumerate(batch.scorers):
        if bool(asked[:, column].any()):
            metrics[f"reward/{name}"] = batch.scores[asked[:, column], :, column].mean().item()
    for updates in range(run.pipeline.max_staleness + 1):
        metrics[f"staleness/{updates}"] = (batch.staleness == updates).float().mean().item()
    metrics |= _mismatch(batch, outputs)
    return metrics | _ratios(batch, outputs, correction_of(run.algorithm)) | credit.metrics | outputs.sums


def update_flops(batch: Batch, model: ModelSizes, learner: LearnerConfig, *, adapters: bool = False) -> int:
    """Model FLOPs of one update: the reference forward, the policy forward and backward, as every recipe needs them.

    What a recipe wants besides, such as the unconditional branch, does not count.
    """
    lengths = [len(prompt.conditional) for prompt in batch.prompts]
    forwards = 1 + learner.several_updates  # several updates begin with a forward pass of the policy
    updates = learner.updates_per_batch
    passes = [
        forwards * forward_flops(model, n) + updates * training_flops(model, n, adapters=adapters) for n in lengths
    ]
    return batch.tokens.shape[1] * sum(passes)


def _mismatch(batch: GroupBatch, outputs: UpdateOutputs) -> dict[str, float]:
    fresh, older = ~batch.off_policy, (batch.staleness > 0) & ~batch.moved
    difference = (outputs.logprobs - batch.logprobs).abs()
    metrics = {}
    if bool(fresh.any()):  # only there the engine had the learner's weights
        metrics["mismatch/abs_logprob"] = difference[fresh].mean().item()
        metrics["mismatch/max_abs_logprob"] = difference[fresh].max().item()
    if bool(older.any()):
        metrics["mismatch/with_drift_abs_logprob"] = difference[older].mean().item()
    if bool(batch.moved.any()):
        metrics["mismatch/moved_abs_logprob"] = difference[batch.moved].mean().item()
    return metrics


def _ratios(batch: GroupBatch, outputs: UpdateOutputs, correction: Correction) -> dict[str, float]:
    stale = batch.off_policy  # [N]
    if not bool(stale.any()):  # a fresh group's ratio is 1 by construction
        return {"ratio/mean": 1.0, "ratio/max": 1.0, "ratio/clipped": 0.0, "ess": 1.0}
    logprobs, behavior = outputs.logprobs[stale], outputs.behavior[stale]
    ratio = corrected_ratio(logprobs, behavior, Correction())
    return {
        "ratio/mean": ratio.mean().item(),
        "ratio/max": ratio.max().item(),
        "ratio/clipped": beyond(logprobs, behavior, correction).float().mean().item(),
        "ess": effective_sample_size(corrected_ratio(logprobs, behavior, correction)).item(),
    }
