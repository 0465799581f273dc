"""What a benchmark is, and the result of one evaluation: named metrics with standard errors, and every image."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import TypeAdapter, ValidationError

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError, RunError
from stage_ray.files import atomic_write, read_json
from stage_ray.records import Prompt, ScoredGroup
from stage_ray.registry import Registry

BENCHMARKS = Registry("stage_ray.evaluation", "Benchmark", "benchmark")


@dataclass(frozen=True, slots=True)
class MetricValue:
    """One metric of a benchmark.

    Attributes:
        value: the metric itself, in the benchmark's unit.
        error: its standard error; None where a single image says nothing about the spread.
        images: images that count in it.
        by_prompt: prompt index -> mean over the images of that prompt; two evaluations are compared prompt by prompt.
        parts: the metrics of which this one is the mean, listed before it; empty where it is measured itself.

    Example:
        >>> str(MetricValue(0.5, 0.0213)), str(MetricValue(0.5))
        ('0.500 ± 0.021', '0.500')
    """

    value: float
    error: float | None = None
    images: int = 0
    by_prompt: Mapping[int, float] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" ± {self.error:.3f}" if self.error is not None else "")


class Benchmark(Protocol):
    """Which prompts are drawn, what scores the images, and what the scores add up to. Built without arguments.

    Attributes:
        name: as ``evaluation.benchmark`` and ``evaluate --suite`` know it.
        headline: the metric that stands for all of them in a run's summary; more of it is better.
        prompts, rewards: location of its prompt file, and its scorers, as in a config. A run's evaluation takes the
            run's own instead.
        images_per_prompt: as the benchmark defines it.
    """

    name: str
    headline: str
    prompts: str
    rewards: Sequence[RewardConfig]
    images_per_prompt: int

    def aggregate(self, prompts: Sequence[Prompt], scored: Sequence[ScoredGroup]) -> dict[str, MetricValue]:
        """Metrics in the order in which people read them, from one scored group for each prompt, in their order.

        A metric without a usable image is absent, never 0; the headline too.
        """
        ...


def find_benchmark(name: str, key: str = "evaluation.benchmark") -> Benchmark:
    """The benchmark of a name or dotted path; ``key`` is the config's, for messages.

    Raises:
        ConfigError: there is none (with the nearest name), or it has no method `aggregate`.
    """
    kind = BENCHMARKS.find(name, key)
    if not callable(kind) or not callable(getattr(kind, "aggregate", None)):
        raise ConfigError(f"{key} = {name!r} is not a class with a method aggregate(prompts, scored)")
    return kind()


def mean_over_images(by_prompt: Mapping[int, Sequence[float]]) -> MetricValue | None:
    """Mean over all images; None without any.

    Prompts are the independent units of its standard error, since images of one prompt are alike.

    Args:
        by_prompt: prompt index -> the values of its images; none of them empty.
    """
    values = [value for images in by_prompt.values() for value in images]
    if not values:
        return None
    means = {prompt: float(np.mean(images)) for prompt, images in by_prompt.items()}
    units = list(means.values()) if len(means) > 1 else values  # of a single prompt only its images spread
    error = float(np.std(units, ddof=1) / math.sqrt(len(units))) if len(units) > 1 else None
    return MetricValue(sum(values) / len(values), error, len(values), means)


def mean_of_metrics(metrics: Mapping[str, MetricValue]) -> MetricValue | None:
    """Mean of independent metrics: its variance is the sum of theirs over their number squared. None without any."""
    if not metrics:
        return None
    # Without the error of one of them the mean has none either.
    errors = [metric.error for metric in metrics.values() if metric.error is not None]
    error = math.sqrt(sum(error * error for error in errors)) / len(metrics) if len(errors) == len(metrics) else None
    value = sum(metric.value for metric in metrics.values()) / len(metrics)
    return MetricValue(value, error, sum(metric.images for metric in metrics.values()), parts=tuple(metrics))


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The result of one evaluation; JSON-able, see `write_result`.

    Attributes:
        benchmark: its name.
        headline: name of its headline metric.
        metrics: as `Benchmark.aggregate` gives them.
        scores: mean of every scorer, by its column; None where it scored nothing.
        images: for each image ``prompt_index``, ``prompt``, ``image``, ``scores`` (None where invalid) and ``details``.
        conditions: what it depends on beside the weights, by key of a config: see `conditions` in ``loop.py``.
            Empty in a file of an earlier version.
    """

    benchmark: str
    headline: str
    metrics: Mapping[str, MetricValue]
    scores: Mapping[str, float | None] = field(default_factory=dict)
    images: tuple[Mapping[str, Any], ...] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def headline_value(self) -> float | None:
        """Value of the headline metric; None where no image could be judged."""
        return self.metrics[self.headline].value if self.headline in self.metrics else None


def unlike(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Why two evaluations cannot be compared prompt by prompt, from their ``conditions``; "" where they can.

    Example:
        >>> unlike({"evaluation.seed": 20}, {"evaluation.seed": 21})
        'before and after cannot be compared: evaluation.seed was 20 and is 21'
    """
    said = []
    for key in sorted(before.keys() | after.keys()):
        if (was := before.get(key)) != (now := after.get(key)):
            values = f"was {was} and is {now}"
            said.append(f"{key} {values if len(values) < 100 else 'was another'}")
    if not before or not after:
        said = ["an earlier version wrote one of them, and not what it was made with"]
    return f"before and after cannot be compared: {'; '.join(said)}" if said else ""


def changes(before: EvaluationResult, after: EvaluationResult) -> dict[str, MetricValue]:
    """Change of each metric that two evaluations of one benchmark have, with its standard error.

    Both draw the same prompts with the same seeds, so the change is estimated prompt by prompt: its standard error is
    that of the prompts' differences, which is smaller than what the two values' errors suggest. The change of a mean
    of metrics is the mean of their changes.
    """
    found: dict[str, MetricValue] = {}
    for name, was in before.metrics.items():
        now = after.metrics.get(name)
        if now is None or any(part not in found for part in was.parts):
            continue
        both = was.by_prompt.keys() & now.by_prompt.keys()  # prompts with a judged image in both
        differences = {prompt: [now.by_prompt[prompt] - was.by_prompt[prompt]] for prompt in sorted(both)}
        parts = {part: found[part] for part in was.parts}  # empty where the metric is measured itself
        if (change := mean_of_metrics(parts) or mean_over_images(differences)) is not None:
            found[name] = change
    return found


def write_result(path: Path, result: EvaluationResult, **more: Any) -> None:
    """Write a result as JSON, whole or not at all; ``more`` are keys beside its own."""
    atomic_write(path, json.dumps(asdict(result) | more, indent=1))


def read_result(path: Path) -> EvaluationResult | None:
    """Read a file of `write_result`, without its further keys; None if there is no file.

    Raises:
        RunError: the file is damaged, or another version wrote it.
    """
    data = read_json(path)
    try:
        return None if data is None else TypeAdapter(EvaluationResult).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]  # one is enough to see what the file is
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise RunError(f"{path} is not an evaluation ({why}); remove it to go on without it") from error


def plain(value: Any) -> Any:
    """What a scorer says, where JSON does not know its type: NumPy's numbers and arrays as Python's, else a text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)


def summarise(benchmark: Benchmark, prompts: Sequence[Prompt], scored: Sequence[ScoredGroup]) -> EvaluationResult:
    """Sum up the scored groups of `requests_for`'s requests, in any order.

    Raises:
        ValueError: `scored` is not exactly one group for each prompt.
    """
    ordered = sorted(scored, key=lambda group: group.group_id)
    if [group.group_id for group in ordered] != list(range(len(prompts))):  # one is missing, twice or a stranger
        raise ValueError(f"{len(scored)} scored groups do not match {len(prompts)} prompts; each needs exactly one")
    images: list[dict[str, Any]] = []
    columns: dict[str, list[float]] = {name: [] for group in ordered for name in group.names}  # valid scores only
    for prompt, group in zip(prompts, ordered, strict=True):
        # Details are a user's: a trip through JSON makes NaN null, and whatever JSON does not know what `plain` says.
        details = json.loads(json.dumps(group.details, default=plain), parse_constant=lambda _: None)
        for image, said in enumerate(details):
            judged = zip(group.names, group.scores[image], group.valid[image], strict=True)
            scores = {name: float(score) if valid else None for name, score, valid in judged}
            for name, score in scores.items():
                columns[name] += [] if score is None else [score]
            where = {"prompt_index": prompt.index, "prompt": prompt.text, "image": image}
            images.append({**where, "scores": scores, "details": said})
    means = {name: sum(scores) / len(scores) if scores else None for name, scores in columns.items()}
    metrics = benchmark.aggregate(prompts, ordered)
    return EvaluationResult(benchmark.name, benchmark.headline, metrics, means, tuple(images))
