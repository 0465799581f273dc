"""One figure of an evaluation with its standard error, and how such figures come about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class MetricValue:
    """One metric of a benchmark.

    Attributes:
        value: the metric itself, in the benchmark's unit.
        error: its standard error; None where a single image says nothing about the spread.
        images: images that count in it.
        by_prompt: prompt index -> mean over the images of that prompt; two evaluations are compared prompt by prompt.
        parts: the metrics of which this one is the mean, listed before it; empty where it is measured itself.
        better: "larger" or "smaller", or "neither"; "" says nothing: of the headline and its parts more is better.
        draws: of a metric that is no mean over prompts, its value over prompts drawn anew with replacement, shifted
            to spread around ``value``. Two evaluations of as many prompts draw the same ones, in the same order.

    Example:
        >>> str(MetricValue(0.5, 0.0213)), str(MetricValue(0.5))
        ('0.500 ± 0.021', '0.500')
    """

    value: float
    error: float | None = None
    images: int = 0
    by_prompt: Mapping[int, float] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    better: str = ""
    draws: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" ± {self.error:.3f}" if self.error is not None else "")


def mean_over_images(by_prompt: Mapping[int, Sequence[float]], better: str = "") -> MetricValue | None:
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
    return MetricValue(sum(values) / len(values), error, len(values), means, better=better)


def mean_of_metrics(metrics: Mapping[str, MetricValue]) -> MetricValue | None:
    """Mean of independent metrics: its variance is the sum of theirs over their number squared. None without any."""
    if not metrics:
        return None
    # Without the error of one of them the mean has none either.
    errors = [metric.error for metric in metrics.values() if metric.error is not None]
    error = math.sqrt(sum(error * error for error in errors)) / len(metrics) if len(errors) == len(metrics) else None
    value = sum(metric.value for metric in metrics.values()) / len(metrics)
    return MetricValue(value, error, sum(metric.images for metric in metrics.values()), parts=tuple(metrics))


def drawn_value(value: float, draws: Sequence[float] | np.ndarray, images: int, better: str = "") -> MetricValue:
    """A metric that is no mean over prompts, from its values over prompts drawn anew: their spread is its error."""
    spread = np.asarray(draws, np.float64)
    shifted = tuple(np.round(spread - spread.mean() + value, 6).tolist()) if len(spread) else ()
    error = float(spread.std(ddof=1)) if len(spread) > 1 else None
    return MetricValue(value, error, images, better=better, draws=shifted)
