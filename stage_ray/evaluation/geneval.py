"""GenEval (arXiv 2310.11513): several images a prompt; the score is the mean over tasks of the mean strict verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stage_ray.evaluation.result import EvaluationResult, TaskScore
from stage_ray.pipeline.prompts import image_seeds
from stage_ray.records import Prompt, RolloutRequest, ScoredGroup

UNTAGGED = "all"


def requests_for(prompts: Sequence[Prompt], images_per_prompt: int, seed: int) -> list[RolloutRequest]:
    """One request a prompt, numbered in the order of `prompts`.

    Seeds depend on (seed, prompt.index, image) alone: a selection of the prompts gets the same images as all of them.
    """
    return [
        RolloutRequest(number, prompt, image_seeds(seed, prompt.index, images_per_prompt))
        for number, prompt in enumerate(prompts)
    ]


def summarise(prompts: Sequence[Prompt], scored: Sequence[ScoredGroup], suite: str = "geneval") -> EvaluationResult:
    """Sum up the scored groups of `requests_for`'s requests, in any order.

    Raises:
        ValueError: `scored` is not exactly one group for each prompt.
    """
    groups = {group.group_id: group for group in scored}
    if len(groups) != len(scored) or sorted(groups) != list(range(len(prompts))):
        raise ValueError(f"{len(scored)} scored groups do not match {len(prompts)} prompts; each needs exactly one")
    verdicts = [verdict for number, prompt in enumerate(prompts) for verdict in _verdicts(prompt, groups[number])]
    tasks = _tasks(verdicts)
    errors = [task.standard_error for task in tasks.values()]
    known = [error for error in errors if error is not None]
    # Means of independent tasks: the variance of their mean is the sum of their variances over their number squared.
    error = math.sqrt(sum(e * e for e in known)) / len(tasks) if tasks and len(known) == len(errors) else None
    return EvaluationResult(
        suite=suite,
        overall=_mean([task.score for task in tasks.values()]),
        standard_error=error,
        tasks=tasks,
        soft=_mean([verdict["soft"] for verdict in verdicts if verdict["soft"] is not None]),
        scores=_scorer_means(scored),
        prompts=len(prompts),
        images=len(verdicts),
        invalid=sum(verdict["correct"] is None for verdict in verdicts),
        verdicts=tuple(verdicts),
    )


def _verdicts(prompt: Prompt, group: ScoredGroup) -> list[dict[str, Any]]:
    """What is known of each image of a group; the first scorer that gives strict verdicts is the judge."""
    rows = []
    for image, said in enumerate(group.details):
        judged: Mapping[str, Any] = next((detail for detail in said.values() if "correct" in detail), {})
        failed = next((str(detail["error"]) for detail in said.values() if "error" in detail), "")
        rows.append(
            {
                "prompt_index": prompt.index,
                "prompt": prompt.text,
                "task": prompt.record.get("tag") or UNTAGGED,
                "image": image,
                "correct": judged.get("correct"),
                "soft": judged.get("soft"),
                "reason": judged.get("reason", failed),
                "scores": {
                    name: float(group.scores[image, column]) if group.valid[image, column] else None
                    for column, name in enumerate(group.names)
                },
            }
        )
    return rows


def _tasks(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, TaskScore]:
    by_task: dict[str, dict[int, list[float]]] = {}
    for verdict in verdicts:
        if verdict["correct"] is not None:
            by_prompt = by_task.setdefault(verdict["task"], {})
            by_prompt.setdefault(verdict["prompt_index"], []).append(float(verdict["correct"]))
    return {name: _task(list(by_prompt.values())) for name, by_prompt in by_task.items()}


def _task(by_prompt: Sequence[Sequence[float]]) -> TaskScore:
    values = np.concatenate([np.asarray(images) for images in by_prompt])
    units = np.asarray([np.mean(images) for images in by_prompt]) if len(by_prompt) > 1 else values
    error = float(units.std(ddof=1) / math.sqrt(len(units))) if len(units) > 1 else None
    return TaskScore(float(values.mean()), error, prompts=len(by_prompt), images=len(values))


def _scorer_means(scored: Sequence[ScoredGroup]) -> dict[str, float | None]:
    names = dict.fromkeys(name for group in scored for name in group.names)
    means: dict[str, float | None] = {}
    for name in names:
        columns = [(group, group.names.index(name)) for group in scored if name in group.names]
        means[name] = _mean([float(s) for g, c in columns for s in g.scores[g.valid[:, c], c]])
    return means


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
