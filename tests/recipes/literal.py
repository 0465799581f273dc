"""The recipes' formulas in loops over Python floats, read off their papers: slow, one group at a time.

Shares no line with `stage_ray`. Every function gives the loss of one group as a function of the log-probabilities that
carry a gradient; what is held constant is worked out from the values at which the gradient is wanted. `gradient` takes
central differences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

Row = list[float]
Table = list[Row]
Loss = Callable[[Table], float]


@dataclass
class Group:
    """One group: tokens, policy and reference log-probs, entropies [G][T]; scores [G][R]; codebook [V][D]."""

    tokens: list[list[int]]
    logp: Table
    reference: Table
    behavior: Table
    entropy: Table
    guided_entropy: Table
    scores: Table
    codebook: Table
    grid: tuple[int, int]
    features: Table = field(default_factory=list)


def gradient(loss: Loss, at: Table, step: float = 1e-6) -> Table:
    """d loss / d at[i][t] by central differences."""
    found = []
    for i, row in enumerate(at):
        found.append([])
        for t in range(len(row)):
            values = []
            for sign in (1, -1):
                moved = [list(other) for other in at]
                moved[i][t] += sign * step
                values.append(loss(moved))
            found[-1].append((values[0] - values[1]) / (2 * step))
    return found


def normalised(rewards: Row, eps: float = 1e-4) -> Row:
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    return [0.0 if len(set(rewards)) == 1 else (r - mean) / (deviation + eps) for r in rewards]


def advantages(group: Group) -> Row:
    return normalised([sum(row) for row in group.scores])


def k3(logp: float, reference: float) -> float:
    return math.exp(reference - logp) - (reference - logp) - 1


def clipped(ratio: float, advantage: float, clip: float | None) -> float:
    if clip is None:
        return ratio * advantage
    return min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def mean_over(group: Group, term: Callable[[int, int], float]) -> float:
    G, T = len(group.tokens), len(group.tokens[0])
    return sum(term(i, t) for i in range(G) for t in range(T)) / (G * T)


def ar_grpo(group: Group, beta: float, clip: float) -> Loss:
    """The same formula as GRPO with a clip; the caller passes guided log-probabilities."""
    A = advantages(group)

    def loss(logp: Table) -> float:
        def term(i: int, t: int) -> float:
            ratio = math.exp(logp[i][t] - group.behavior[i][t])
            return -clipped(ratio, A[i], clip) + beta * k3(logp[i][t], group.reference[i][t])

        return mean_over(group, term)

    return loss


def smoothed(entropy: Row, grid: tuple[int, int]) -> Table:
    h, w = grid
    out = [[0.0] * w for _ in range(h)]
    for i in range(h):
        for j in range(w):
            places = [(i, j), (i, j - 1), (i - 1, j - 1), (i - 1, j), (i - 1, j + 1)]
            there = [entropy[a * w + b] for a, b in places if a >= 0 and 0 <= b < w]
            out[i][j] = sum(there) / len(there)
    return out


def slope(values: Row, at: int) -> float:
    if at == 0:
        return values[1] - values[0]
    if at == len(values) - 1:
        return values[-1] - values[-2]
    return (values[at + 1] - values[at - 1]) / 2


def cosine(a: Row, b: Row) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def critical_tokens(group: Group, share: float = 0.1) -> list[set[int]]:
    """The tokens that GCPO trains of each image: first tenth, edges of the entropy map, least alike of the rest."""
    (h, w), T, G = group.grid, len(group.tokens[0]), len(group.tokens)
    count, alike, found = int(share * T), [], []
    for t in range(T):
        pairs = [(i, j) for i in range(G) for j in range(G) if i != j]
        book = [group.codebook[group.tokens[i][t]] for i in range(G)]
        alike.append(sum(cosine(book[i], book[j]) for i, j in pairs) / len(pairs))
    for i in range(G):
        chosen = set(range(count))
        map_ = smoothed(group.guided_entropy[i], group.grid)
        size = {
            a * w + b: math.hypot(slope(map_[a], b), slope([map_[c][b] for c in range(h)], a))
            for a in range(h)
            for b in range(w)
        }
        middle = range(int(0.1 * T), int(0.1 * T) + int(0.8 * T))
        chosen |= set(sorted(middle, key=lambda t: -size[t])[:count])  # noqa: B023  used at once
        rest = [t for t in range(T) if t not in chosen]
        chosen |= set(sorted(rest, key=lambda t: alike[t])[:count])
        found.append(chosen)
    return found


def gcpo(group: Group, beta: float) -> Loss:
    A, chosen = advantages(group), critical_tokens(group)
    dynamic = []
    for row, reference in zip(group.logp, group.reference, strict=True):
        drift = [math.exp(min(max(a - b, -0.5), 0.5)) for a, b in zip(row, reference, strict=True)]
        dynamic.append([statistics.fmean(drift[: t + 1]) for t in range(len(drift))])

    def loss(logp: Table) -> float:
        total, count = 0.0, 0
        for i, places in enumerate(chosen):
            for t in places:
                ratio = math.exp(logp[i][t] - group.behavior[i][t])
                total += -dynamic[i][t] * ratio * A[i] + beta * k3(logp[i][t], group.reference[i][t])
                count += 1
        return total / count

    return loss


def eg_grpo(group: Group, beta: float, bonus: float = 0.3) -> Loss:
    A, V, T = advantages(group), len(group.codebook), len(group.tokens[0])
    gated = []
    for i, row in enumerate(group.entropy):
        scaled = [h / math.log(V) for h in row]
        ordered = sorted(scaled)
        high, low = ordered[int(0.5 * T)], ordered[int(0.2 * T)]
        gated.append(
            [0.0 if h < low else A[i] + (min(bonus * abs(A[i]), bonus * h) if h > high else 0.0) for h in scaled]
        )

    def loss(logp: Table) -> float:
        def term(i: int, t: int) -> float:
            ratio = math.exp(logp[i][t] - group.behavior[i][t])
            return -ratio * gated[i][t] + beta * k3(logp[i][t], group.reference[i][t])

        return mean_over(group, term)

    return loss


def pcpo(group: Group, beta: float, xi: float) -> Loss:
    A = advantages(group)

    def loss(logp: Table) -> float:
        def term(i: int, t: int) -> float:
            log_ratio = logp[i][t] - group.behavior[i][t]
            hinge = max(0.0, xi * abs(A[i]) - A[i] * log_ratio)
            return hinge + beta * k3(logp[i][t], group.reference[i][t])

        return mean_over(group, term)

    return loss


def diverse_grpo(group: Group, beta: float, bonus: float, sizes: list[int], early: int) -> Loss:
    """``sizes``: of the cluster of each image, clustered by the reader's eye."""
    G = len(group.tokens)
    rewards = [sum(row) + bonus * math.sqrt(G / n) for row, n in zip(group.scores, sizes, strict=True)]
    A = normalised(rewards)

    def loss(logp: Table) -> float:
        policy = mean_over(group, lambda i, t: -math.exp(logp[i][t] - group.behavior[i][t]) * A[i])
        held = [k3(logp[i][t], group.reference[i][t]) for i in range(G) for t in range(early)]
        return policy + beta * statistics.fmean(held)

    return loss


def synergy(group: Group, beta: float, gamma: float) -> Loss:
    T = len(group.tokens[0])
    first, second = (normalised([row[k] for row in group.scores]) for k in (0, 1))

    def weight(t: int) -> float:
        tau = math.floor(25 * t / T)
        if tau < 6:
            return 0.7
        return 0.5 if tau >= 22 else 0.3 + 0.4 * (1 - 1 / (1 + math.exp(-0.8 * (tau - 10))))

    def advantage(i: int, t: int) -> float:
        a, b = first[i], second[i]
        extra = gamma * math.tanh(a * b) * (1 if max(a, b) > 0 else -1)
        return min(max(weight(t) * a + (1 - weight(t)) * b + extra, -5), 5)

    def loss(logp: Table) -> float:
        def term(i: int, t: int) -> float:
            ratio = math.exp(logp[i][t] - group.behavior[i][t])
            return -ratio * advantage(i, t) + beta * k3(logp[i][t], group.reference[i][t])

        return mean_over(group, term)

    return loss


def divergence(p: Row, q: Row, kind: str) -> float:
    """Of two whole distributions, given by log-probabilities."""

    def kl(a: Row, b: Row) -> float:
        return sum(math.exp(x) * (x - y) for x, y in zip(a, b, strict=True))

    if kind == "policy_reference":
        return kl(p, q)
    if kind == "reference_policy":
        return kl(q, p)
    middle = [math.log((math.exp(x) + math.exp(y)) / 2) for x, y in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2
