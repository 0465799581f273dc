"""``compare.html``: several runs on one self-contained page, those that differ in their seed alone as one arm."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from stage_ray.config.hardware import machine_metadata
from stage_ray.files import atomic_write
from stage_ray.report.arms import Arm, Estimate, RunRecord, arms_of, difference, estimate, incomparable
from stage_ray.report.charts import banded_chart, running_mean
from stage_ray.report.page import pictures, write_page

LAST = 40  # steps whose mean stands for the end of a training
MOST_SHEETS = 3

Value = Callable[[Mapping[str, Any]], float | None]


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


@dataclass(frozen=True, slots=True)
class SuiteTable:
    """One suite's evaluations after training.

    Attributes:
        estimates: metric -> one of each arm; None where an arm has it not.
        differences: metric -> of each arm to the first one, over runs of the same seed; None for the first.
        ways: metric -> 1 where more of it is better, -1 where less is, 0 where neither is.
        measures: the metrics among them that are no benchmark's.
        unlike: why the arms cannot be compared; "" where they can.
    """

    headline: str
    images: int
    estimates: Mapping[str, Sequence[Estimate | None]]
    differences: Mapping[str, Sequence[Estimate | None]]
    ways: Mapping[str, int]
    measures: Sequence[str]
    unlike: str


def write_comparison(
    run_dirs: Sequence[Path], page: Path, json_file: Path | None = None, names: Mapping[Path, str] | None = None
) -> Path:
    """Write the page, and the numbers on it as JSON where that is wanted; each whole or not at all.

    ``names``: of each run's arm, where they are not to be named by what differs.

    Raises:
        ConfigError: a directory holds no run, or two runs say the same twice.
        RunError: a file of a run is damaged; names it.
    """
    arms, told = arms_of([RunRecord.read(directory) for directory in run_dirs], names)
    suites = {name: _suite(arms, name) for name in dict.fromkeys(name for arm in arms for name in _suites(arm))}
    trained = {title: [_end(arm, value) for arm in arms] for title, value in TRAINING.items()}
    trained = {title: ends for title, ends in trained.items() if any(ends)}
    if json_file is not None:
        numbers = {
            "arms": {arm.name: [str(run.directory) for run in arm.runs] for arm in arms},
            f"training, last {LAST} steps": {
                title: {
                    name: dict(zip(("mean", "smallest", "largest"), end, strict=True))
                    for name, end in zip(_names(arms), ends, strict=True)
                    if end
                }
                for title, ends in trained.items()
            },
            "suites": {name: _numbers(arms, table) for name, table in suites.items()},
        }
        atomic_write(json_file, json.dumps(numbers, indent=1))
    write_page(
        page,
        "compare.html.j2",
        arms=arms,
        told=told,
        suites=suites,
        trained=trained,
        last=LAST,
        charts=_evaluation_charts(arms, suites) | _training_charts(arms),
        sheets=_sheets(arms),
        machine=machine_metadata(),
    )
    return page


def _names(arms: Sequence[Arm]) -> list[str]:
    return [arm.name for arm in arms]


def _suites(arm: Arm) -> list[str]:
    """Suites that every run of an arm was evaluated on after training."""
    return [name for name in arm.runs[0].after if all(name in run.after for run in arm.runs)]


def _suite(arms: Sequence[Arm], suite: str) -> SuiteTable:
    found = [[run.after[suite] for run in arm.runs] if suite in _suites(arm) else [] for arm in arms]
    like = next(some[0] for some in found if some)
    unlike = incomparable(arms, suite)
    first = {run.seed: run.after[suite] for run in arms[0].runs if suite in run.after}
    estimates: dict[str, list[Estimate | None]] = {}
    differences: dict[str, list[Estimate | None]] = {}
    known = {metric: result for some in found for result in some for metric in result.metrics}  # measures may differ
    ways = {metric: result.direction(metric) for metric, result in known.items()}
    measures = [metric for metric, result in known.items() if result.metrics[metric].better]
    for metric in {**like.metrics, **known}:
        estimates[metric] = [estimate(some, metric) for some in found]
        differences[metric] = [None]
        for arm, some in zip(arms[1:], found[1:], strict=True):
            pairs = [(first[run.seed], run.after[suite]) for run in arm.runs if run.seed in first and some]
            differences[metric].append(None if unlike else difference(pairs, metric))
    images = sum(len(result.images) for result in next(some for some in found if some))
    return SuiteTable(like.headline, images, estimates, differences, ways, measures, unlike)


def _end(arm: Arm, value: Value) -> tuple[float, float, float] | None:
    """Mean, smallest and largest over an arm's runs of their means over the last steps; None without any."""
    means = []
    for run in arm.runs:
        values = [one for row in run.rows[-LAST:] if (one := value(row)) is not None]
        means += [fmean(values)] if values else []
    return (fmean(means), min(means), max(means)) if means else None


def _training_charts(arms: Sequence[Arm]) -> dict[str, Markup]:
    """A chart of each training metric: an arm's mean over its runs, smoothed, and how far these spread."""
    charts = {}
    for title, value in TRAINING.items():
        series = {}
        for arm in arms:
            steps = {row["step"] for run in arm.runs for row in run.rows}
            smooth = []
            for run in arm.runs:
                by_step = {row["step"]: value(row) for row in run.rows}
                smooth.append(dict(zip(by_step, running_mean(list(by_step.values())), strict=True)))
            series[arm.name] = {
                step: [one[step] for one in smooth if step in one and one[step] == one[step]] for step in steps
            }
        charts[title] = _banded(series)
    return {title: found for title, found in charts.items() if found}


def _evaluation_charts(arms: Sequence[Arm], suites: Mapping[str, SuiteTable]) -> dict[str, Markup]:
    """Charts of each suite that was evaluated between, by step: of the headline and of each measure."""
    charts = {}
    for suite, table in suites.items():
        for metric in dict.fromkeys([table.headline, *table.measures]):
            series: dict[str, dict[int, list[float]]] = {}
            for arm in arms:
                points = series.setdefault(arm.name, {})
                for run in arm.runs:
                    for step, result in run.between.get(suite, {}).items():
                        if metric in result.metrics:
                            points.setdefault(step, []).append(result.metrics[metric].value)
            if not table.unlike and any(len(points) > 1 for points in series.values()):
                charts[f"{suite or 'Held-out'}: {metric}"] = _banded(series)
    return charts


def _banded(series: Mapping[str, Mapping[int, Sequence[float]]]) -> Markup:
    """Arms over steps: means of the runs' values, and half of what lies between the smallest and the largest."""
    steps = sorted({step for points in series.values() for step, values in points.items() if values})
    lines = {
        name: [
            (fmean(values), (max(values) - min(values)) / 2) if (values := points.get(step)) else None for step in steps
        ]
        for name, points in series.items()
    }
    return Markup(banded_chart(steps, lines)) if steps else Markup()


def _sheets(arms: Sequence[Arm]) -> dict[str, dict[str, str]]:
    """Pictures of equal prompts and steps, side by side: of each arm's first run, at steps that all of these have."""
    found = [
        {path.name: path for path in run.directory.glob("samples/step-*.png")} for run in (a.runs[0] for a in arms)
    ]
    shared = sorted(set.intersection(*map(set, found)))
    if len(shared) > MOST_SHEETS:
        shared = [shared[round(i * (len(shared) - 1) / (MOST_SHEETS - 1))] for i in range(MOST_SHEETS)]
    return {
        f"After step {int(Path(name).stem.partition('-')[2])}": pictures(
            {files[name]: arm.name for arm, files in zip(arms, found, strict=True)}
        )
        for name in shared
    }


def _numbers(arms: Sequence[Arm], table: SuiteTable) -> dict[str, Any]:
    """A suite's table, JSON-able."""

    def of(column: Sequence[Estimate | None]) -> dict[str, Any]:
        return {name: asdict(one) for name, one in zip(_names(arms), column, strict=True) if one}

    return {
        "headline": table.headline,
        "better": {metric: {1: "larger", -1: "smaller"}[way] for metric, way in table.ways.items() if way},
        "unlike": table.unlike,
        "metrics": {metric: of(column) for metric, column in table.estimates.items()},
        f"difference to {arms[0].name}": {metric: of(column) for metric, column in table.differences.items()},
    }
