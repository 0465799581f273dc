"""Named alarms for what fails silently in RL (promise 9): pure functions of one step's metrics."""

from __future__ import annotations

from collections.abc import Mapping

ENTROPY_COLLAPSE_RATIO = 0.5
"""Alarm when the policy's token entropy falls below this share of the reference's on the same tokens."""
KL_BLOWUP = 0.5
"""Alarm above this k3 to the reference, nats a token. Healthy runs of the paper's kind stay an order below."""
MISMATCH = 0.05
"""Alarm above this mean |delta log p| between engine and learner, nats a token; bfloat16 explains about 0.01.

In older groups the policy's own drift counts too: a healthy update moves it by a few thousandths."""


def alarms(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Alarms of one update, as (name, one sentence with the numbers and what to look at).

    Names and meanings are in `stage_ray.observability.registry.ALARMS`. ``no_valid_reward`` also rings where a run
    stops because no group can be scored (`stage_ray.pipeline.stream`), and ``learner_lost`` where the learner died and
    the run goes back to a checkpoint (`stage_ray.train`). A metric that is absent raises no alarm.

    Example:
        alarms({"grad_norm": 0.0})[0][0]  # 'zero_gradient'
    """
    kl, mismatch = metrics.get("kl", 0.0), metrics.get("mismatch/abs_logprob", 0.0)
    drifted = metrics.get("mismatch/with_drift_abs_logprob", 0.0)
    policy, reference = metrics.get("entropy/policy"), metrics.get("entropy/reference")
    found: list[tuple[str, str]] = []
    if metrics.get("grad_norm") == 0.0:
        found.append(("zero_gradient", "the gradient is exactly 0; this update changed nothing"))
    if metrics.get("advantage/zero_groups") == 1.0:
        found.append(("no_variance", "in every group all images had the same reward; only the KL was trained on"))
    if metrics.get("reward/informative") == 0.0:
        steered = metrics.get("advantage/mean_abs", 0.0) > 0  # by what the recipe adds to the scores
        rest = "the entropy reward alone steers" if steered else "nothing steers the policy"
        found.append(("no_valid_reward", f"no scorer told the images of any group apart; {rest}"))
    if policy is not None and reference is not None and policy < ENTROPY_COLLAPSE_RATIO * reference:
        text = f"token entropy is {policy:.3g} nats, the reference's {reference:.3g}; raise algorithm.beta"
        found.append(("entropy_collapse", text))
    if kl > KL_BLOWUP:
        found.append(("kl_blowup", f"KL to the reference is {kl:.3g} nats a token; raise algorithm.beta"))
    if mismatch > MISMATCH:
        text = f"rollout and learner differ by {mismatch:.3g} nats a token; compare rollout.dtype and learner.autocast"
        found.append(("mismatch", text))
    elif drifted > MISMATCH >= mismatch:
        text = f"older groups differ by {drifted:.3g} nats a token from when they were drawn; compare rollout.dtype and"
        found.append(("mismatch", f"{text} learner.autocast, and if they agree lower learner.lr"))
    return found
