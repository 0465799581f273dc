"""What one update tells about itself, as flat floats under the names that metrics, report and alarms share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stage_ray.algorithm.advantages import combine_rewards
from stage_ray.algorithm.credit import Credit
from stage_ray.algorithm.entropy import entropy_closeness
from stage_ray.algorithm.kl import k3_kl
from stage_ray.algorithm.losses import TokenWeights
from stage_ray.algorithm.off_policy import (
    Correction,
    beyond,
    corrected_ratio,
    effective_sample_size,
    importance_ratio,
)
from stage_ray.algorithm.similarity import advantage_weight
from stage_ray.config import AlgorithmConfig, RunConfig
from stage_ray.learner.batch import Batch


@dataclass(frozen=True, slots=True)
class ReferenceOutputs:
    """The reference model on a batch: float32 [N, G, T] log-probabilities and entropies (nats), and the seconds."""

    logprobs: Tensor
    entropy: Tensor
    seconds: float


@dataclass(frozen=True, slots=True)
class PolicyOutputs:
    """The policy on a batch.

    Attributes:
        logprobs: float32 [N, G, T], detached, nats.
        behavior: float32 [N, G, T], what ratios are taken against; ``logprobs`` themselves in fresh groups.
        loss, policy: of the whole batch.
        weights: of every token, corrections apart.
        seconds: forward and backward.
    """

    logprobs: Tensor
    behavior: Tensor
    loss: float
    policy: float
    weights: TokenWeights
    seconds: float


def update_metrics(
    batch: Batch, reference: ReferenceOutputs, signals: Credit, outputs: PolicyOutputs, run: RunConfig
) -> dict[str, float]:
    """Flat metrics of one update.

    Returns:
        - ``reward/mean``: weighted sum of all scorers, mean over images; no scorer dropped, no entropy reward in it.
        - ``reward/std``: its standard deviation inside a group, mean over groups.
        - ``reward/<scorer>``: unweighted mean of one scorer.
        - ``reward/informative``: share of (group, scorer) pairs in which the scorer told the images apart.
        - ``advantage/mean_abs``; ``advantage/zero_groups``: share of groups in which every advantage is 0.
        - ``entropy_reward/mean``: mean of ``1 / (1 + (H_ref - H)^2)`` over images; 1 is as uncertain as the reference.
        - ``entropy/policy`` (recorded while sampling), ``entropy/reference``: nats a token, same tokens.
        - ``kl``: unweighted k3 to the reference, nats a token; ``kl/weighted``: as it enters the loss.
        - ``loss``, ``policy_loss``; ``similarity/mean``; ``weight/mean``: mean weight of a token in the policy term.
        - ``staleness/mean``, ``staleness/max``: updates that groups lag behind; ``staleness/0``, ``staleness/1``, ...
          to the bound: share of groups with that lag.
        - ``ratio/mean``, ``ratio/max``: importance ratios of tokens of older groups, uncorrected; 1 without any.
        - ``ratio/clipped``: share of those tokens that ``algorithm.correction`` caps or masks; 0 without any.
        - ``ess``: effective sample size of those tokens' corrected ratios, a share of their number; 1 without any.
        - ``mismatch/abs_logprob``, ``mismatch/max_abs_logprob``: mean and greatest ``|delta log p|`` between engine and
          learner at the same version; absent when every group is older.
        - ``mismatch/with_drift_abs_logprob``: mean ``|delta log p|`` of older groups, recorded by the engine and
          now: what engine and learner differ by and how far the policy has moved in the updates between, not told
          apart; absent when every group is fresh.
        - ``images``, ``tokens``; ``time/reference_s``, ``time/policy_s``.
    """
    weights = batch.scores.new_tensor([reward.weight for reward in run.rewards])
    rewards = combine_rewards(batch.scores, weights=weights)
    reweighted = run.algorithm.reweight_advantage
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(dim=1).mean().item(),
        "reward/informative": signals.informative.float().mean().item(),
        "advantage/mean_abs": signals.advantages.abs().mean().item(),
        "advantage/zero_groups": (signals.advantages == 0).all(dim=1).float().mean().item(),
        "entropy_reward/mean": entropy_closeness(batch.entropy.mean(-1), reference.entropy.mean(-1)).mean().item(),
        "entropy/policy": batch.entropy.mean().item(),
        "entropy/reference": reference.entropy.mean().item(),
        "kl": k3_kl(outputs.logprobs, reference.logprobs).mean().item(),
        "kl/weighted": (outputs.weights.kl * k3_kl(outputs.logprobs, reference.logprobs)).sum().item(),
        "loss": outputs.loss,
        "policy_loss": outputs.policy,
        "similarity/mean": signals.similarity.mean().item(),
        "weight/mean": advantage_weight(signals.similarity).mean().item() if reweighted else 1.0,
        "images": float(batch.tokens.shape[0] * batch.tokens.shape[1]),
        "tokens": float(batch.tokens.numel()),
        "time/reference_s": reference.seconds,
        "time/policy_s": outputs.seconds,
    }
    for column, reward in enumerate(run.rewards):
        metrics[f"reward/{reward.column}"] = batch.scores[..., column].mean().item()
    return metrics | _mismatch(batch, outputs) | _staleness(batch, run) | _ratios(batch, outputs, run)


def correction_of(algorithm: AlgorithmConfig) -> Correction:
    """What a config does with ratios far from 1.

    Example:
        >>> correction_of(AlgorithmConfig()).kind
        'truncate'
    """
    low, high = algorithm.ratio_range
    return Correction(algorithm.correction, cap=algorithm.ratio_cap, low=low, high=high)


def _mismatch(batch: Batch, outputs: PolicyOutputs) -> dict[str, float]:
    fresh = batch.staleness == 0
    difference = (outputs.logprobs - batch.logprobs).abs()
    metrics = {}
    if bool(fresh.any()):
        metrics["mismatch/abs_logprob"] = difference[fresh].mean().item()
        metrics["mismatch/max_abs_logprob"] = difference[fresh].max().item()
    if not bool(fresh.all()):
        metrics["mismatch/with_drift_abs_logprob"] = difference[~fresh].mean().item()
    return metrics


def _staleness(batch: Batch, run: RunConfig) -> dict[str, float]:
    lag = batch.staleness
    metrics = {"staleness/mean": lag.float().mean().item(), "staleness/max": float(lag.max().item())}
    for updates in range(run.pipeline.max_staleness + 1):
        metrics[f"staleness/{updates}"] = (lag == updates).float().mean().item()
    return metrics


def _ratios(batch: Batch, outputs: PolicyOutputs, run: RunConfig) -> dict[str, float]:
    stale = batch.staleness > 0
    if not bool(stale.any()):
        return {"ratio/mean": 1.0, "ratio/max": 1.0, "ratio/clipped": 0.0, "ess": 1.0}
    logprobs, behavior, correction = outputs.logprobs[stale], outputs.behavior[stale], correction_of(run.algorithm)
    ratio = importance_ratio(logprobs, behavior)
    return {
        "ratio/mean": ratio.mean().item(),
        "ratio/max": ratio.max().item(),
        "ratio/clipped": beyond(logprobs, behavior, correction).float().mean().item(),
        "ess": effective_sample_size(corrected_ratio(logprobs, behavior, correction)).item(),
    }
