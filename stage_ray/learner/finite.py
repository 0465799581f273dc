"""Groups with values that are not finite are left out of an update, so that one of them does not stop a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from stage_ray.algorithm.losses import TokenWeights, k3_kl
from stage_ray.algorithm.off_policy import corrected_ratio
from stage_ray.config import RunConfig
from stage_ray.learner.batch import LearnerError
from stage_ray.learner.metrics import UpdateOutputs
from stage_ray.recipes.base import Credit, ReferenceOutputs, correction_of
from stage_ray.records import RolloutGroup, ScoredGroup

log = logging.getLogger(__name__)
Train = Callable[[Sequence[RolloutGroup], Sequence[ScoredGroup], int], dict[str, float]]


class NonFiniteError(LearnerError):
    """A loss or gradient that is not finite, and the groups that made it so: place in the batch -> what is not."""

    def __init__(self, message: str, blamed: Mapping[int, str]) -> None:
        super().__init__(message)
        self.blamed = blamed


def train_finite(
    train: Train, groups: Sequence[RolloutGroup], scored: Sequence[ScoredGroup], ranks: int
) -> dict[str, float]:
    """The metrics of ``train``, which is called again without the groups that a NonFiniteError blames.

    Every rank blames and leaves out the same groups. Ranks train as many groups each: where what is left does not
    divide, copies of its first group fill the batch, their number being ``train``'s third argument. Raises a
    LearnerError where no group is left, or none is to blame.
    """
    left, judged, copies = list(groups), list(scored), 0
    while True:
        try:
            metrics = train(left, judged, copies)
        except NonFiniteError as error:
            if not error.blamed:
                raise
            whole = len(left) - copies
            kept = [n for n in range(whole) if n not in error.blamed]
            if not kept:
                raise LearnerError(f"{error}, or set algorithm.kl_ratio_cap: no group of the batch is finite") from None
            lost = [f"group {left[n].group_id} ({error.blamed[n]})" for n in range(whole) if n in error.blamed]
            log.warning("%s; left out: %s", error, ", ".join(lost))
        else:
            return metrics | {"groups/dropped": float(len(groups) - len(left) + copies)}
        copies = -len(kept) % ranks
        kept += kept[:1] * copies
        left, judged = [left[n] for n in kept], [judged[n] for n in kept]


def blame(reference: ReferenceOutputs, credit: Credit, outputs: UpdateOutputs, run: RunConfig) -> dict[int, str]:
    """Groups with a value that is not finite, in a term of the loss or in its square, which a gradient's norm takes."""
    algorithm = run.algorithm
    kl = k3_kl(outputs.logprobs, reference.logprobs, ratio_cap=algorithm.kl_ratio_cap)
    ratio = corrected_ratio(outputs.logprobs, outputs.behavior, correction_of(algorithm))
    values = {
        "log-probabilities": outputs.logprobs,
        "the reference's log-probabilities": reference.logprobs,
        "the reference's entropy": reference.entropy,
        "advantages": credit.advantages,
        "token weights": credit.weights.policy + credit.weights.kl,
        "KL": kl.square(),
        "importance ratios": ratio.square(),
    }
    blamed: dict[int, str] = {}
    for name, value in values.items():
        for place in (~torch.isfinite(value).flatten(1).all(dim=1)).nonzero().flatten().tolist():
            blamed.setdefault(place, name)
    return blamed


def without_copies(credit: Credit, copies: int) -> Credit:
    """The credit of a batch whose last groups are copies: these weigh nothing, and the others as if they were not."""
    if not copies:
        return credit
    count = len(credit.advantages)
    scale = credit.advantages.new_full((count, 1, 1), count / (count - copies))
    scale[count - copies :] = 0.0
    kept = (scale > 0).view(count, *[1] * (credit.advantages.dim() - 1))
    weights = TokenWeights(credit.weights.policy * scale, credit.weights.kl * scale)
    images = None if credit.images is None else credit.images * scale[..., 0]
    return replace(credit, advantages=credit.advantages * kept, weights=weights, images=images)
