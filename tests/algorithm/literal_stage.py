"""The published training step, one group at a time, in loops over Python floats: slow, and read straight off the paper.

Shares no line with `stage_ray.algorithm`. The gradient of the loss in each log-probability is written out by hand.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass


@dataclass
class LiteralStep:
    """One group: advantages [G], similarity, gradient [G][T]; loss, its parts, its gradient in mean entropies [G]."""

    advantages: list[float]
    similarity: list[list[float]]
    gradient: list[list[float]]
    loss: float
    policy: float
    kl: float
    entropy_gradient: list[float]


def rewards_of(
    scores: list[list[float]], weights: list[float], drop_constant: bool, progress: float | None = None
) -> tuple[list[float], bool]:
    """Scores [G][R] to rewards [G], and whether any scorer says anything; ``progress_learning`` at that share."""
    rewards, any_valid = [0.0] * len(scores), False
    for k in range(len(weights)):
        column = [row[k] for row in scores]
        valid, step_rate = statistics.stdev(column) > 1e-6, 2 * (progress or 0.0)
        mean = sum(column) / len(column)
        promising = progress is None or (max(column) > 0.5 * (1 - step_rate) and mean >= 0.3 * (1 - step_rate))
        any_valid = any_valid or (valid and promising)
        if (valid or not drop_constant) and promising:
            rewards = [r + weights[k] * value for r, value in zip(rewards, column, strict=True)]
    return rewards, any_valid


def with_entropy_reward(rewards: list[float], h: list[float], h_ref: list[float], weight: float) -> list[float]:
    """Add 0.4 * (e_i - mean of the nonzero e) to the images that have one, e only on the group's best."""
    best = max(rewards)
    e = [1 / (1 + (b - a) ** 2) if r == best else 0.0 for r, a, b in zip(rewards, h, h_ref, strict=True)]
    nonzero = [value for value in e if value != 0.0]
    mean = sum(nonzero) / len(nonzero)
    return [r + weight * (value - mean) if value != 0.0 else r for r, value in zip(rewards, e, strict=True)]


def cosine(a: list[float], b: list[float]) -> float:
    """Cosine of two vectors."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.hypot(*a) * math.hypot(*b))


def similarity_of(tokens: list[list[int]], codebook: list[list[float]], advantages: list[float]) -> list[list[float]]:
    """Mean cosine to oppositely signed peers, self 0."""
    G, T = len(tokens), len(tokens[0])
    out = [[0.0] * T for _ in range(G)]
    for i in range(G):
        for t in range(T):
            total, count = 0.0, 0
            for j in range(G):
                if advantages[i] * advantages[j] <= 0:
                    count += 1
                    if i != j:
                        total += cosine(codebook[tokens[i][t]], codebook[tokens[j][t]])
            out[i][t] = total / max(count, 1)
    return out


def literal_step(
    scores: list[list[float]],
    h: list[float],
    h_ref: list[float],
    tokens: list[list[int]],
    codebook: list[list[float]],
    logp: list[list[float]],
    logp_ref: list[list[float]],
    *,
    weights: list[float],
    drop_constant: bool,
    entropy_weight: float,
    beta: float,
    reweight_advantage: bool = True,
    reweight_kl: bool = True,
    kl_floor: float = 0.5,
    kl_slope: float = 0.5,
    weight_cap: float | None = None,
    progress: float | None = None,
    drop_silent_kl: bool = False,
    kl_scale: float = 1.0,
    entropy_penalty: float = 0.0,
) -> LiteralStep:
    """One group, ratio 1."""
    G, T = len(tokens), len(tokens[0])
    rewards, any_valid = rewards_of(scores, weights, drop_constant, progress)
    if entropy_weight > 0:
        rewards = with_entropy_reward(rewards, h, h_ref, entropy_weight)
    mean, std = sum(rewards) / G, statistics.stdev(rewards)
    A = [(r - mean) / (std + 1e-4) for r in rewards]
    s = similarity_of(tokens, codebook, A)
    if not any_valid and entropy_weight == 0:
        s = [[1.0] * T for _ in range(G)]
    policy = kl = total = 0.0
    gradient = [[0.0] * T for _ in range(G)]
    w = [[min(max((1 - s[i][t]) / 2, 0), 1) if reweight_advantage else 1.0 for t in range(T)] for i in range(G)]
    for i in range(G):
        for t in range(T):
            total += w[i][t]
    for i in range(G):
        for t in range(T):
            share = w[i][t] / (total + 1e-6)
            if weight_cap is not None:
                share = min(share, weight_cap)
            kappa = kl_floor + min(max(s[i][t] + 1, 0), 1) * kl_slope if reweight_kl else 1.0
            kappa *= 0.0 if drop_silent_kl and not any_valid else kl_scale
            d = logp_ref[i][t] - logp[i][t]
            policy -= share * 1.0 * A[i]
            kl += kappa * (math.exp(d) - d - 1) / (G * T)
            gradient[i][t] = -share * A[i] + beta * kappa * (1 - math.exp(d)) / (G * T)
    gaps = [a - b for a, b in zip(h, h_ref, strict=True)]
    penalty = entropy_penalty * sum(gap**2 for gap in gaps) / G
    slopes = [2 * entropy_penalty * gap / G for gap in gaps]
    return LiteralStep(A, s, gradient, policy + beta * kl + penalty, policy, kl, slopes)
