"""Two sittings of one evaluation, before and after training, task by task, with honest error bars."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from stage_ray.evaluation.result import EvaluationResult

OVERALL = "mean of tasks"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its standard error, None where it is not known.

    Example:
        >>> str(Estimate(0.5, 0.0213)), str(Estimate(0.5, None))
        ('0.500 ± 0.021', '0.500')
    """

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" ± {self.error:.3f}" if self.error is not None else "")

    @property
    def clear(self) -> bool:
        """Is it more than two standard errors away from zero?"""
        return self.error is not None and abs(self.value) > 2 * self.error


@dataclass(frozen=True, slots=True)
class TaskComparison:
    """One task; ``after`` and ``change`` are None where there was no second sitting."""

    task: str
    images: int
    before: Estimate
    after: Estimate | None
    change: Estimate | None


def compare(before: EvaluationResult, after: EvaluationResult | None) -> list[TaskComparison]:
    """Task by task, then their mean.

    Both sittings draw the same prompts with the same seeds, so the change is estimated prompt by prompt: its standard
    error is that of the prompts' differences, which is smaller than what the two columns' errors suggest.
    """
    rows = []
    for task, score in before.tasks.items():
        again = after.tasks.get(task) if after else None
        change = _paired(_by_prompt(before, task), _by_prompt(after, task)) if after and again else None
        was = Estimate(score.score, score.standard_error)
        now = Estimate(again.score, again.standard_error) if again else None
        rows.append(TaskComparison(task, score.images, was, now, change))
    if before.overall is not None:
        was = Estimate(before.overall, before.standard_error)
        now = Estimate(after.overall, after.standard_error) if after and after.overall is not None else None
        changes = [row.change for row in rows if row.change]
        change = _mean(changes) if now and len(changes) == len(rows) else None
        rows.append(TaskComparison(OVERALL, sum(row.images for row in rows), was, now, change))
    return rows


def _by_prompt(result: EvaluationResult, task: str) -> dict[int, float]:
    """Share of right images of every prompt of a task."""
    verdicts: dict[int, list[float]] = {}
    for verdict in result.verdicts:
        if verdict["task"] == task and verdict["correct"] is not None:
            verdicts.setdefault(verdict["prompt_index"], []).append(float(verdict["correct"]))
    return {prompt: statistics.fmean(values) for prompt, values in verdicts.items()}


def _paired(before: dict[int, float], after: dict[int, float]) -> Estimate | None:
    differences = [after[prompt] - value for prompt, value in before.items() if prompt in after]
    if not differences:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return Estimate(statistics.fmean(differences), error)


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates."""
    errors = [estimate.error for estimate in estimates if estimate.error is not None]
    error = math.hypot(*errors) / len(estimates) if len(errors) == len(estimates) else None
    return Estimate(statistics.fmean(estimate.value for estimate in estimates), error)
