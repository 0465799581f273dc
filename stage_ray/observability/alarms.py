"""Named alarms for what fails silently in RL (promise 9): pure functions of one step's metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

ENTROPY_COLLAPSE_RATIO = 0.5  # the policy's token entropy by the reference's, on the same tokens
KL_BLOWUP = 0.5  # k3 to the reference, nats a token; healthy runs of the paper's kind stay an order below
MISMATCH = 0.05
"""Mean |delta log p| between engine and learner, nats a token; bfloat16 explains about 0.01.

In older groups the policy's own drift counts too: a healthy update moves it by a few thousandths."""


def alarms(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Alarms of one update, as (name, one sentence with the numbers and what to look at).

    Names and meanings are in `stage_ray.observability.registry.ALARMS`. A metric that is absent raises no alarm.
    """
    policy, reference = metrics.get("entropy/policy", math.nan), metrics.get("entropy/reference", math.nan)
    kl, mismatch = metrics.get("kl", 0.0), metrics.get("mismatch/abs_logprob", 0.0)
    drifted = metrics.get("mismatch/with_drift_abs_logprob", 0.0)
    steered = metrics.get("advantage/mean_abs", 0.0) > 0  # by what the recipe adds to the scores
    rest = "the entropy reward alone steers" if steered else "nothing steers the policy"
    older = f"older groups differ by {drifted:.3g} nats a token from when they were drawn"
    dtypes = "compare rollout.dtype and learner.autocast"
    found = {
        "zero_gradient": metrics.get("grad_norm") == 0 and "the gradient is exactly 0; this update changed nothing",
        "no_variance": metrics.get("advantage/zero_groups") == 1
        and "in every group all images had the same reward; only the KL was trained on",
        "no_valid_reward": metrics.get("reward/informative") == 0
        and f"no scorer told the images of any group apart; {rest}",
        "entropy_collapse": policy < ENTROPY_COLLAPSE_RATIO * reference
        and f"token entropy is {policy:.3g} nats, the reference's {reference:.3g}; raise algorithm.beta",
        "kl_blowup": kl > KL_BLOWUP and f"KL to the reference is {kl:.3g} nats a token; raise algorithm.beta",
        "mismatch": (mismatch > MISMATCH and f"rollout and learner differ by {mismatch:.3g} nats a token; {dtypes}")
        or (drifted > MISMATCH and f"{older}; {dtypes}, and if they agree lower learner.lr"),
    }
    return [(name, text) for name, text in found.items() if text]


def overoptimization(
    metric: str, since: int, change: float, error: float | None, rewards: Sequence[float]
) -> list[tuple[str, str]]:
    """The alarm of an evaluation by scorers that are not rewarded: it falls while the reward rises.

    ``change`` is how far the headline ``metric`` has come from its best, at step ``since``, and ``error`` the standard
    error of that. ``rewards`` are ``reward/mean`` from then on; they rise where their second half is above the first.
    """
    half = len(rewards) // 2
    first, last = (sum(some) / half if half else math.nan for some in (rewards[:half], rewards[len(rewards) - half :]))
    if error is None or change >= -2 * error or not last > first:
        return []
    text = f"{metric} fell by {-change:.3g} ± {error:.2g} since step {since}, while the reward rose from {first:.3g} "
    text += f"to {last:.3g}; raise algorithm.beta, stop there, or reward what the suite measures"
    return list({"overoptimization": text}.items())
