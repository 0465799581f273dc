"""Runs that are to be compared: those that differ in their seed alone are one arm; means of arms and intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import EvaluationResult, read_result, unlike
from stage_ray.evaluation.suites import EVALUATION, results, suite_dirs
from stage_ray.observability.metrics_logger import METRICS_FILE, read_steps
from stage_ray.report.page import config_of

# Keys in which the runs of one arm may differ: they say which run it is, where it ran and what it kept.
OWN = ("seed", "run_dir", "resume", "evaluation.seed", "cluster.", "logs.", "checkpoint.")
NAMING = ("recipe", "algorithm.", "learner.", "rewards")  # keys that name an arm before all others do
DRAWS, COVERED = 4000, 0.95


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run directory says of its run.

    Attributes:
        config: every key of its resolved config, with dots between its parts; a list is its JSON.
        rows: its steps, as in ``metrics.jsonl``.
        after: suite -> the evaluation at the end; "" is the run's own.
        between: suite -> all evaluations by the updates done, without their images.
    """

    directory: Path
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    after: Mapping[str, EvaluationResult]
    between: Mapping[str, Mapping[int, EvaluationResult]]

    @classmethod
    def read(cls, directory: Path) -> RunRecord:
        """Read a run directory.

        Raises:
            ConfigError: it holds no run.
            RunError: a file of the run is damaged; names it.
        """
        config = dict(_flat(yaml.safe_load(config_of(directory)) or {}))
        suites = {"" if path.name == EVALUATION else path.name: path for path in suite_dirs(directory)}
        after = {name: found for name, path in suites.items() if (found := read_result(path / "after.json"))}
        between = {name: results(path) for name, path in suites.items()}
        return cls(directory, config, read_steps(directory / METRICS_FILE), after, between)

    @property
    def seed(self) -> Any:
        """The run's seed, by which runs of two arms are paired."""
        return self.config.get("seed")


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs of one config with different seeds, in the order of these."""

    name: str
    runs: tuple[RunRecord, ...]


def arms_of(
    runs: Sequence[RunRecord], names: Mapping[Path, str] | None = None
) -> tuple[list[Arm], dict[str, list[Any]]]:
    """Arms in the order in which their first runs are given, and the keys in which they differ: values by arm.

    An arm is named by ``names`` of its first run's directory, or by the values of as few keys as tell all arms apart.

    Raises:
        ConfigError: two runs have the same config and seed.
    """
    grouped: dict[str, list[RunRecord]] = {}
    for run in runs:
        shared = {key: value for key, value in run.config.items() if not key.startswith(OWN)}
        others = grouped.setdefault(json.dumps(shared, sort_keys=True, default=str), [])
        if twin := next((other for other in others if other.seed == run.seed), None):
            raise ConfigError(
                f"{twin.directory} and {run.directory} are runs of one config and one seed ({run.seed}): they say the "
                "same twice; leave one of them out"
            )
        others.append(run)
    arms = [sorted(some, key=lambda run: str(run.seed)) for some in grouped.values()]
    keys = {key for some in arms for key in some[0].config if not key.startswith(OWN)}
    values = {key: [some[0].config.get(key) for some in arms] for key in keys}
    told = {key: found for key, found in sorted(values.items()) if len({*map(str, found)}) > 1}
    called = [names[some[0].directory] for some in arms] if names else _names(told, len(arms))
    return [Arm(name, tuple(some)) for name, some in zip(called, arms, strict=True)], told


def _names(told: Mapping[str, Sequence[Any]], count: int) -> list[str]:
    """A name for each arm: values of keys, taken in until no two arms are alike; what an arm lacks is left out."""

    def rank(key: str) -> int:
        return next((i for i, start in enumerate(NAMING) if key.startswith(start)), len(NAMING))

    labels: list[list[str]] = [[] for _ in range(count)]
    for key in sorted(told, key=lambda key: (rank(key), key)):
        before = len({*map(tuple, labels)})
        name = "" if key == "recipe" else f"{key.removeprefix('algorithm.')}="
        added = ["" if value is None else f"{name}{value}" for value in told[key]]
        longer = [[*label, one] for label, one in zip(labels, added, strict=True)]
        if len({*map(tuple, longer)}) > before:
            labels = longer
    return [", ".join(filter(None, label)) or "all runs" for label in labels]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, json.dumps(value, sort_keys=True, default=str) if isinstance(value, list | dict) else value


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over runs and prompts with the interval that covers 95 % of its bootstrap; None where nothing spreads."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        small = 0 < max(abs(one) for one in (self.value, self.low, self.high) if one is not None) < 0.1
        digits = ".2e" if small and abs(self.value) < 1e-3 else ".4f" if small else ".3f"
        return f"{self.value:{digits}}" + ("" if self.low is None else f" [{self.low:{digits}}, {self.high:{digits}}]")

    @property
    def excludes_zero(self) -> bool:
        """Whether its interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def incomparable(arms: Sequence[Arm], suite: str) -> str:
    """Why the arms' evaluations of a suite cannot be compared; "" where they can. Each run may have its own seed."""
    found = [run.after[suite].conditions for arm in arms for run in arm.runs if suite in run.after]
    known = [one and {**one, "evaluation.seed": "its own"} for one in found]
    reasons = (unlike(known[0], other) for other in known[1:])
    return next((why.replace("before and after", "the runs") for why in reasons if why), "")


def estimate(runs: Sequence[EvaluationResult], metric: str) -> Estimate | None:
    """Mean of a metric over evaluations of the same prompts by runs of one arm; None where one of them has it not.

    Runs and prompts are both drawn anew, with replacement; prompts inside of each part that the metric is the mean of.
    """
    if (drawn := _draws(runs, metric)) is not None:
        return _bootstrap_draws(*drawn)
    tables = _tables(runs, metric)
    return _bootstrap(tables) if tables else None


def difference(pairs: Sequence[tuple[EvaluationResult, EvaluationResult]], metric: str) -> Estimate | None:
    """Mean of (second - first) over pairs of runs with one seed each, prompt by prompt; drawn anew as in `estimate`."""
    was, now = (_draws([pair[side] for pair in pairs], metric) for side in (0, 1))
    if was is not None and now is not None and was[1].shape == now[1].shape:
        return _bootstrap_draws(now[0] - was[0], now[1] - was[1])
    first, second = (_tables([pair[side] for pair in pairs], metric) for side in (0, 1))
    if not (first and second) or [table.shape for table in first] != [table.shape for table in second]:
        return None
    return _bootstrap([now - was for was, now in zip(first, second, strict=True)])


def over_runs(values: Sequence[float]) -> Estimate:
    """Mean of one number of each run, such as its reward at the end; runs are drawn anew, with replacement."""
    return _bootstrap([np.array(values)[:, None]])


def _draws(runs: Sequence[EvaluationResult], metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Of a metric with draws its values [R], and what it is over prompts drawn anew [R, D]; None for any other."""
    found = [run.metrics[metric] for run in runs if metric in run.metrics]
    if not found or len(found) < len(runs) or len({len(one.draws) for one in found}) > 1 or not found[0].draws:
        return None
    return np.array([one.value for one in found]), np.array([one.draws for one in found])


def _bootstrap_draws(values: np.ndarray, drawn: np.ndarray) -> Estimate:
    """Mean of values [R] and its interval; a draw has the same prompts in all runs."""
    noise, (count, draws) = np.random.default_rng(0), drawn.shape
    chosen = noise.multinomial(count, [1 / count] * count, size=DRAWS) / count  # [DRAWS, R], shares of runs
    means = (chosen * drawn[:, noise.integers(draws, size=DRAWS)].T).sum(axis=1)
    low, high = np.quantile(means, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def _tables(runs: Sequence[EvaluationResult], metric: str) -> list[np.ndarray] | None:
    """Of each part of a metric the means by run and prompt [R, P]; of prompts that all runs have."""
    if not runs or any(metric not in run.metrics for run in runs):
        return None
    tables = []
    for part in runs[0].metrics[metric].parts or (metric,):
        found = [run.metrics[part].by_prompt if part in run.metrics else {} for run in runs]
        shared = sorted(set.intersection(*(set(one) for one in found)))
        if not shared:
            return None
        tables.append(np.array([[one[prompt] for prompt in shared] for one in found]))
    return tables


def _bootstrap(tables: Sequence[np.ndarray]) -> Estimate:
    """Mean of the tables' means, each [R, P], and its interval."""
    noise = np.random.default_rng(0)
    value = float(np.mean([table.mean() for table in tables]))
    count = len(tables[0])
    if all(table.size == 1 for table in tables):
        return Estimate(value)
    chosen = noise.multinomial(count, [1 / count] * count, size=DRAWS) / count  # [D, R], shares of runs
    drawn = np.zeros(DRAWS)
    for table in tables:
        prompts = table.shape[1]
        weights = noise.multinomial(prompts, [1 / prompts] * prompts, size=DRAWS) / prompts  # [D, P]
        drawn += np.einsum("dr,rp,dp->d", chosen, table, weights, optimize=True) / len(tables)
    low, high = np.quantile(drawn, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return Estimate(value, float(low), float(high))
