"""``report.html``: a run on one self-contained page, from whatever its directory holds, finished or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median_high
from typing import Any

import yaml
from markupsafe import Markup

from stage_ray.config.hardware import machine_metadata
from stage_ray.evaluation.base import EvaluationResult, changes, read_result, unlike
from stage_ray.evaluation.metrics import MetricValue
from stage_ray.evaluation.suites import BEST_FILE, EVALUATION, results, suite_dirs
from stage_ray.files import read_json
from stage_ray.observability.metrics_logger import ALARMS_FILE, MACHINE_FILE, METRICS_FILE, read_steps
from stage_ray.observability.registry import find
from stage_ray.report.charts import banded_chart, chart
from stage_ray.report.page import config_of, pictures, write_page

MOST_SAMPLES = 6
TOTAL = "whole step"
IDLE = "Idle share of each role"
ROLES = ("rollout", "reward", "learner")
CHARTS: Mapping[str, Mapping[str, str]] = {  # title -> metric: legend, in the order of the page
    "Reward, mean over images": {"reward/mean": "reward"},
    "Each scorer, mean over images": {},  # whatever scorers there are
    "KL to the reference, nats a token": {"kl": "KL"},
    "Token entropy, nats": {"entropy/policy": "policy", "entropy/reference": "reference"},
    "Gradient norm before clipping": {"grad_norm": "gradient norm"},
    "Token similarity to oppositely rewarded images": {"similarity/mean": "similarity"},
    "|Δ log p| between rollout and learner, nats": {
        "mismatch/abs_logprob": "mean",
        "mismatch/max_abs_logprob": "maximum",
        "mismatch/with_drift_abs_logprob": "mean of older groups, drift included",
    },
    "Loss": {"loss": "loss"},
    "Images a second, whole step": {"images_per_s": "images/s"},
    IDLE: {f"busy/{role}": role for role in ROLES},  # drawn as 1 - busy
    "Model FLOPs utilisation while working": {f"mfu/{role}": role for role in ("rollout", "learner")},
    "Seconds a step, by stage": {
        **{f"time/{stage}_s": stage for stage in ("rollout", "score", "update", "publish")},
        "time/step_s": TOTAL,
    },
}


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory, whole or not at all, and return its path.

    Raises:
        ConfigError: the directory holds no run.
        RunError: a file of the run is damaged; names it.
    """
    config_text = config_of(run_dir)
    rows = read_steps(run_dir / METRICS_FILE)
    own, *suites = [_Comparison.read(directory) for directory in suite_dirs(run_dir)]
    alarms: dict[str, list[dict[str, Any]]] = {}  # by name, in the order they first rang
    for row in read_steps(run_dir / ALARMS_FILE):
        alarms.setdefault(row["alarm"], []).append(row)
    sheets = sorted((run_dir / "samples").glob("step-*.png"))
    if len(sheets) > MOST_SAMPLES:  # spread evenly over the run, first and last among them
        sheets = [sheets[round(i * (len(sheets) - 1) / (MOST_SAMPLES - 1))] for i in range(MOST_SAMPLES)]
    config = yaml.safe_load(config_text)
    done, wanted = rows[-1]["step"] if rows else 0, config.get("steps", 0)
    state = f"{done} steps" if done >= wanted else f"{done} of {wanted} steps so far"
    evaluated = [one for one in (own, *suites) if one.before or one.after]
    last_missing = all(one.after is None for one in (own, *suites))
    if done >= wanted and last_missing and config.get("evaluation", {}).get("enabled", True):
        state += ", not evaluated afterwards"
    if search := config.get("rollout", {}).get("search"):
        state += f"; trained on images that {search} chose, which biases the update"
    path = run_dir / "report.html"
    write_page(
        path,
        "report.html.j2",
        name=run_dir.resolve().name,
        state=state,
        cards=_cards(rows),
        overview=_overview(rows, evaluated),
        evaluated=evaluated,
        shown=evaluated[0] if evaluated else own,
        own=own,
        best=read_json(run_dir / BEST_FILE),
        pair=pictures({run_dir / "evaluation" / f"{name}.png": name.capitalize() for name in ("before", "after")}),
        alarms=alarms,
        roles=_roles(rows),
        charts=_evaluation_charts([own, *suites]) | _charts(rows),
        samples=pictures({sheet: f"After step {int(sheet.stem.partition('-')[2])}" for sheet in sheets}),
        config=config_text,
        machine=read_json(run_dir / MACHINE_FILE) or machine_metadata(),
    )
    return path


@dataclass(frozen=True, slots=True)
class _Comparison:
    """The evaluations of one suite: before and after training, and all of them by the updates done."""

    name: str  # "" for the run's own
    before: EvaluationResult | None
    after: EvaluationResult | None
    found: Mapping[int, EvaluationResult]

    @classmethod
    def read(cls, directory: Path) -> _Comparison:
        name = "" if directory.name == EVALUATION else directory.name
        before, after = (read_result(directory / f"{when}.json") for when in ("before", "after"))
        return cls(name, before, after, results(directory))

    @property
    def unlike(self) -> str:
        """Why the two cannot be compared; "" where they can."""
        return unlike(self.before.conditions, self.after.conditions) if self.before and self.after else ""

    @property
    def changed(self) -> dict[str, MetricValue]:
        return changes(self.before, self.after) if self.before and self.after and not self.unlike else {}

    @property
    def tones(self) -> dict[str, str]:
        """Colours of the changes that are more than two standard errors away from zero, where one way is better."""
        found = {}
        for name, change in self.changed.items():
            way = self.after.direction(name) if self.after else 0
            if way and change.error is not None and abs(change.value) > 2 * change.error:
                found[name] = "good" if way * change.value > 0 else "bad"
        return found


@dataclass(frozen=True, slots=True)
class _Line:
    """A quantity before and after training, as text; ``tone`` as of `_Comparison.tones`."""

    name: str
    before: str
    after: str
    change: str = ""
    tone: str = ""


def _overview(rows: Sequence[dict[str, Any]], suites: Sequence[_Comparison]) -> list[_Line]:
    """What a reader wants first: the training reward, each suite's headline, and whatever was measured beside it."""
    lines = []
    rewards = [row["reward/mean"] for row in rows if row.get("reward/mean") is not None]
    if rewards:
        window = max(1, min(20, len(rewards) // 2))  # the two do not overlap
        first, last = fmean(rewards[:window]), fmean(rewards[-window:])
        name = f"training reward, first and last {window} steps"
        lines.append(_Line(name, f"{first:.3f}", f"{last:.3f}", f"{last - first:+.3f}"))
    compared = [(suite, suite.after) for suite in suites if suite.before and suite.after]
    shown = [(suite, after.headline) for suite, after in compared if after.headline in after.metrics]
    for suite, after in compared:  # of what is measured beside the headline, that of which one way is better
        ways = {name: metric.better in ("larger", "smaller") for name, metric in after.metrics.items()}
        shown += [(suite, name) for name, known in ways.items() if known and name != after.headline]
    for suite, name in shown:
        assert suite.before and suite.after
        was, now, changed = (found.get(name) for found in (suite.before.metrics, suite.after.metrics, suite.changed))
        change = f"{'+' * (changed.value >= 0)}{changed}" if changed else ""
        label = f"{suite.name or 'held-out'}: {name}"
        lines.append(_Line(label, str(was or ""), str(now or ""), change, suite.tones.get(name, "")))
    return lines


def _evaluation_charts(suites: Sequence[_Comparison]) -> dict[str, Markup]:
    """Charts of each suite that was evaluated between, as the newest was: the headline with its parts, each measure."""
    charts = {}
    for suite in suites:
        newest = suite.found[max(suite.found)] if suite.found else None
        found = {at: it for at, it in suite.found.items() if newest and not unlike(it.conditions, newest.conditions)}
        if newest is not None and len(found) > 2 and newest.headline in newest.metrics:
            names = (newest.headline, *newest.metrics[newest.headline].parts)
            values = {name: [result.metrics.get(name) for result in found.values()] for name in names}
            series = {
                name: [(it.value, it.error or 0.0) if it else None for it in some] for name, some in values.items()
            }
            title = f"{suite.name or 'Held-out'}: {newest.headline}, ± one standard error"
            charts[title] = Markup(banded_chart(list(found), series))
            for name in (name for name, metric in newest.metrics.items() if metric.better):
                points = [result.metrics.get(name) for result in found.values()]
                line = [(it.value, it.error or 0.0) if it else None for it in points]
                measure = f"{suite.name or 'Held-out'}: {name}, ± one standard error"
                charts[measure] = Markup(banded_chart(list(found), {name: line}))
    return charts


def _cards(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Label -> number in large type, of the training."""
    names, cards = ("time/step_s", "images_per_s"), {}
    seconds, speeds = ([row[name] for row in rows if row.get(name) is not None] for name in names)
    if speeds:
        cards["images a second, median"] = f"{median_high(speeds):.1f}"
    if seconds:
        cards["minutes in training steps"] = f"{sum(seconds) / 60:.1f}"
    return cards


def _idle(busy: Iterable[float | None]) -> list[float | None]:
    """Shares of time without work; the clocks of workers and driver may differ by a little."""
    return [None if share is None else max(0.0, 1 - share) for share in busy]


def _roles(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Role -> its idle share and its MFU, means over steps; "" where the MFU is not known."""
    roles: dict[str, tuple[str, ...]] = {}
    for role in ROLES:
        idle = [share for share in _idle(row.get(f"busy/{role}") for row in rows) if share is not None]
        mfu = [row[f"mfu/{role}"] for row in rows if row.get(f"mfu/{role}") is not None]
        if idle or mfu:
            roles[role] = tuple(f"{100 * fmean(values):.0f}%" if values else "" for values in (idle, mfu))
    return roles


def _charts(rows: Sequence[dict[str, Any]]) -> dict[str, Markup]:
    """Charts of the metrics that are there, by title."""
    found = {name: find(name) for name in sorted({name for row in rows for name in row})}
    scorers = {name: name.partition("/")[2] for name, it in found.items() if it and it.name == "reward/<scorer>"}
    charts = {}
    for title, columns in CHARTS.items():
        labels = {name: label for name, label in (columns or scorers).items() if name in found}
        if labels:
            shown = _idle if title == IDLE else list[float | None]
            series = {label: shown(row.get(name) for row in rows) for name, label in labels.items()}
            total = TOTAL if "time/step_s" in columns else ""
            charts[title] = Markup(chart([row["step"] for row in rows], series, total))
    return charts
