"""What one update tells about itself, as flat floats under the names that metrics, report and alarms share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stage_ray.algorithm.advantages import combine_rewards
from stage_ray.algorithm.entropy import entropy_closeness
from stage_ray.algorithm.kl import k3_kl
from stage_ray.algorithm.losses import TokenWeights
from stage_ray.algorithm.signals import Signals
from stage_ray.algorithm.similarity import advantage_weight
from stage_ray.config import RunConfig
from stage_ray.learner.batch import Batch


@dataclass(frozen=True, slots=True)
class ReferencePass:
    """The reference model on a batch: float32 [N, G, T] log-probabilities and entropies (nats), and the seconds."""

    logprobs: Tensor
    entropy: Tensor
    seconds: float


@dataclass(frozen=True, slots=True)
class PolicyPass:
    """The policy on a batch: float32 [N, G, T] log-probabilities (detached), loss, policy term, weights, seconds."""

    logprobs: Tensor
    loss: float
    policy: float
    weights: TokenWeights
    seconds: float


def update_metrics(
    batch: Batch, reference: ReferencePass, signals: Signals, passed: PolicyPass, run: RunConfig
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
        - ``staleness/max``; ``ratio/max``: greatest importance ratio (1 in groups of the learner's own version).
        - ``mismatch/abs_logprob``, ``mismatch/max_abs_logprob``: mean and greatest ``|delta log p|`` between engine and
          learner at the same version; absent when every group is older.
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
        "kl": k3_kl(passed.logprobs, reference.logprobs).mean().item(),
        "kl/weighted": (passed.weights.kl * k3_kl(passed.logprobs, reference.logprobs)).sum().item(),
        "loss": passed.loss,
        "policy_loss": passed.policy,
        "similarity/mean": signals.similarity.mean().item(),
        "weight/mean": advantage_weight(signals.similarity).mean().item() if reweighted else 1.0,
        "staleness/max": float(batch.staleness.max().item()),
        "images": float(batch.tokens.shape[0] * batch.tokens.shape[1]),
        "tokens": float(batch.tokens.numel()),
        "time/reference_s": reference.seconds,
        "time/policy_s": passed.seconds,
    }
    for column, reward in enumerate(run.rewards):
        metrics[f"reward/{reward.column}"] = batch.scores[..., column].mean().item()
    return metrics | _between_engine_and_learner(batch, passed)


def _between_engine_and_learner(batch: Batch, passed: PolicyPass) -> dict[str, float]:
    difference = passed.logprobs - batch.logprobs  # [N, G, T]
    fresh = batch.staleness == 0
    metrics = {"ratio/max": difference[~fresh].exp().max().item() if not bool(fresh.all()) else 1.0}
    if bool(fresh.any()):
        metrics["mismatch/abs_logprob"] = difference[fresh].abs().mean().item()
        metrics["mismatch/max_abs_logprob"] = difference[fresh].abs().max().item()
    return metrics
