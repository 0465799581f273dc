"""``compare.html``: several runs on one self-contained page, those that differ in their seed alone as one arm."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from stage_ray.config.hardware import machine_metadata
from stage_ray.files import atomic_write
from stage_ray.report.arms import Arm, Estimate, RunRecord, arms_of, difference, estimate, incomparable, over_runs
from stage_ray.report.curves import (
    TRAINING,
    Value,
    chart_of,
    evaluation_curves,
    numbers_of,
    training_curves,
    write_figure,
)
from stage_ray.report.page import pictures, write_page

LAST = 40  # steps whose mean stands for the end of a training
MOST_SHEETS, MOST_SEEDS = 3, 2  # steps, and runs of each arm, of which there are pictures


@dataclass(frozen=True, slots=True)
class SuiteTable:
    """One suite's evaluations after training.

    Attributes:
        estimates: metric -> one of each arm; None where an arm has it not.
        differences: metric -> of each arm to the first one, over runs of the same seed; None for the first.
        ways: metric -> 1 where more of it is better, -1 where less is, 0 where neither is.
        measures: the metrics among them that are no benchmark's.
        images: that were judged, of all runs of each arm.
        unlike: why the arms cannot be compared; "" where they can.
    """

    headline: str
    images: Sequence[int]
    estimates: Mapping[str, Sequence[Estimate | None]]
    differences: Mapping[str, Sequence[Estimate | None]]
    ways: Mapping[str, int]
    measures: Sequence[str]
    unlike: str


def write_comparison(
    run_dirs: Sequence[Path],
    page: Path,
    json_file: Path | None = None,
    names: Mapping[Path, str] | None = None,
    figure: Path | None = None,
    drawn: Sequence[str] = (),
) -> Path:
    """Write the page; where wanted its numbers as JSON and its curves as one picture; each whole or not at all.

    ``names``: of each run's arm, where they are not to be named by what differs. ``drawn``: titles of the picture's
    curves; empty: all.

    Raises:
        ConfigError: a directory holds no run, two runs say the same twice, or no such picture or curve can be drawn.
        RunError: a file of a run is damaged; names it.
    """
    arms, told = arms_of([RunRecord.read(directory) for directory in run_dirs], names)
    suites = {name: _suite(arms, name) for name in dict.fromkeys(name for arm in arms for name in _suites(arm))}
    trained = {title: found for title, value in TRAINING.items() if any((found := _ends(arms, value))[0])}
    curves = {
        title: found
        for name, table in suites.items()
        for title, found in evaluation_curves(arms, name, [table.headline, *table.measures]).items()
        if not table.unlike
    } | training_curves(arms)
    if json_file is not None:
        numbers = {
            "arms": {arm.name: [str(run.directory) for run in arm.runs] for arm in arms},
            "seeds": {arm.name: [run.seed for run in arm.runs] for arm in arms},
            "configs": {key: dict(zip(_names(arms), values, strict=True)) for key, values in told.items()},
            f"training, last {LAST} steps": {
                title: {"metric": _by_arm(arms, ends), f"difference to {arms[0].name}": _by_arm(arms, changes)}
                for title, (ends, changes) in trained.items()
            },
            "suites": {name: _numbers(arms, table) for name, table in suites.items()},
            "curves": {title: numbers_of(found) for title, found in curves.items()},
        }
        atomic_write(json_file, json.dumps(numbers, indent=1, default=str))
    if figure is not None:
        write_figure(figure, curves, drawn)
    write_page(
        page,
        "compare.html.j2",
        arms=arms,
        told=told,
        suites=suites,
        trained=trained,
        last=LAST,
        charts={title: chart_of(found) for title, found in curves.items()},
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
    images = [sum(run.metrics[run.headline].images for run in some if run.headline in run.metrics) for some in found]
    return SuiteTable(like.headline, images, estimates, differences, ways, measures, unlike)


def _ends(arms: Sequence[Arm], value: Value) -> tuple[list[Estimate | None], list[Estimate | None]]:
    """A training metric's mean over the last steps of each arm, and its difference to the first by runs of one seed."""
    means: list[dict[Any, float]] = []
    for arm in arms:
        last = {run.seed: [one for row in run.rows[-LAST:] if (one := value(row)) is not None] for run in arm.runs}
        means.append({seed: fmean(values) for seed, values in last.items() if values})
    ends = [over_runs([*found.values()]) if found else None for found in means]
    changes: list[Estimate | None] = [None]
    for found in means[1:]:
        pairs = [found[seed] - means[0][seed] for seed in found if seed in means[0]]
        changes.append(over_runs(pairs) if pairs else None)
    return ends, changes


def _sheets(arms: Sequence[Arm]) -> dict[str, dict[str, str]]:
    """Pictures of equal prompts, steps and seeds, side by side: of runs with a seed that all arms have, else the first.

    Only steps that all of these runs have.
    """
    by_seed = [{run.seed: run for run in arm.runs} for arm in arms]
    seeds = [seed for seed in by_seed[0] if all(seed in runs for runs in by_seed)][:MOST_SEEDS]
    rows = {f", seed {seed}": [runs[seed] for runs in by_seed] for seed in seeds} or {"": [arm.runs[0] for arm in arms]}
    sheets = {}
    for which, runs in rows.items():
        found = [{path.name: path for path in run.directory.glob("samples/step-*.png")} for run in runs]
        shared = sorted(set.intersection(*map(set, found)))
        if len(shared) > MOST_SHEETS:
            shared = [shared[round(i * (len(shared) - 1) / (MOST_SHEETS - 1))] for i in range(MOST_SHEETS)]
        for name in shared:
            step = int(Path(name).stem.partition("-")[2])
            captions = {files[name]: arm.name for arm, files in zip(arms, found, strict=True)}
            sheets[f"After step {step}{which}"] = pictures(captions)
    return sheets


def _by_arm(arms: Sequence[Arm], column: Sequence[Estimate | None]) -> dict[str, Any]:
    return {name: asdict(one) for name, one in zip(_names(arms), column, strict=True) if one}


def _numbers(arms: Sequence[Arm], table: SuiteTable) -> dict[str, Any]:
    """A suite's table, JSON-able."""
    return {
        "headline": table.headline,
        "images": dict(zip(_names(arms), table.images, strict=True)),
        "better": {metric: {1: "larger", -1: "smaller"}[way] for metric, way in table.ways.items() if way},
        "unlike": table.unlike,
        "metrics": {metric: _by_arm(arms, column) for metric, column in table.estimates.items()},
        f"difference to {arms[0].name}": {metric: _by_arm(arms, found) for metric, found in table.differences.items()},
    }
