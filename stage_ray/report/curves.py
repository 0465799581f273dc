"""Curves of a comparison: what each arm's runs recorded over the steps, as charts and as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from stage_ray.errors import ConfigError, suggest
from stage_ray.report.arms import Arm
from stage_ray.report.charts import Bands, banded_chart, banded_figure, running_mean

Value = Callable[[Mapping[str, Any]], float | None]
Curves = Mapping[str, Mapping[int, tuple[float, float]]]
"""Arm -> step -> mean over its runs, and half of what lies between the smallest and the largest."""


def _column(name: str) -> Value:
    return lambda row: row.get(name)


def _entropy_gap(row: Mapping[str, Any]) -> float | None:
    policy, reference = row.get("entropy/policy"), row.get("entropy/reference")
    return None if policy is None or reference is None else reference - policy


TRAINING: Mapping[str, Value] = {  # title -> what it is of a step, in the order of the page
    "training reward": _column("reward/mean"),
    "KL to the reference, nats a token": _column("kl"),
    "entropy lost against the reference, nats": _entropy_gap,
    "similarity to oppositely rewarded images": _column("similarity/mean"),
    "gradient norm": _column("grad_norm"),
    "images a second": _column("images_per_s"),
}
COLUMNS = (
    *("step", "reward/mean", "kl", "entropy/policy", "entropy/reference", "similarity/mean", "grad_norm"),
    "images_per_s",
)
"""Columns of ``metrics.jsonl`` that a comparison reads."""


def training_curves(arms: Sequence[Arm]) -> dict[str, Curves]:
    """Of each training metric, every run smoothed over nine steps; without those that no run has."""
    curves = {}
    for title, value in TRAINING.items():
        series = {}
        for arm in arms:
            points: dict[int, list[float]] = {}
            for run in arm.runs:
                by_step = {row["step"]: value(row) for row in run.rows}
                for step, mean in zip(by_step, running_mean(list(by_step.values())), strict=True):
                    if mean == mean:  # not NaN
                        points.setdefault(step, []).append(float(mean))
            series[arm.name] = points
        if any(series.values()):
            curves[title] = _spread(series)
    return curves


def evaluation_curves(arms: Sequence[Arm], suite: str, metrics: Sequence[str]) -> dict[str, Curves]:
    """Of metrics of a suite that was evaluated between; without those that no arm has at two steps."""
    curves = {}
    for metric in metrics:
        series: dict[str, dict[int, list[float]]] = {}
        for arm in arms:
            points = series.setdefault(arm.name, {})
            for run in arm.runs:
                for step, result in run.between.get(suite, {}).items():
                    if metric in result.metrics:
                        points.setdefault(step, []).append(result.metrics[metric].value)
        if any(len(points) > 1 for points in series.values()):
            curves[metric if metric == suite else f"{suite or 'Held-out'}: {metric}"] = _spread(series)
    return curves


def chart_of(curves: Curves) -> Markup:
    """The arms' curves, each with its band."""
    return Markup(banded_chart(*_bands(curves)))


def write_figure(path: Path, curves: Mapping[str, Curves], titles: Sequence[str] = ()) -> None:
    """Curves as one picture: those with these titles, in their order, or all; errors of `banded_figure` as well.

    Raises:
        ConfigError: no curve has such a title; with the nearest.
    """
    if (unknown := next((title for title in titles if title not in curves), None)) is not None:
        raise ConfigError(f"{unknown!r} is the title of no curve of these runs; {suggest(unknown, curves)}")
    banded_figure(path, {title: _bands(curves[title]) for title in titles or curves})


def _bands(curves: Curves) -> tuple[list[int], Bands]:
    steps = sorted({step for points in curves.values() for step in points})
    return steps, {name: [points.get(step) for step in steps] for name, points in curves.items()}


def numbers_of(curves: Curves) -> dict[str, dict[str, list[float]]]:
    """The same as JSON, of each arm: steps, means and half widths of the band, to five digits."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, points in curves.items():
        rounded = [[float(f"{number:.5g}") for number in point] for point in points.values()]
        found[name] = {"step": [*points], "mean": [mean for mean, _ in rounded], "half": [half for _, half in rounded]}
    return found


def _spread(series: Mapping[str, Mapping[int, Sequence[float]]]) -> Curves:
    return {
        name: {step: (fmean(values), (max(values) - min(values)) / 2) for step, values in sorted(points.items())}
        for name, points in series.items()
    }
