"""``report.html``: a run on one self-contained page, from whatever its directory holds, finished or not."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from stage_ray.config.hardware import machine_metadata
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import EvaluationResult, MetricValue, read_result
from stage_ray.files import atomic_write, read_json
from stage_ray.observability.metrics_logger import ALARMS_FILE, MACHINE_FILE, METRICS_FILE, read_steps
from stage_ray.report.charts import Series, curves, stacked
from stage_ray.report.comparison import changes, clear

MOST_SAMPLES = 6
CHARTS = {  # title -> metric: legend, in the order of the page
    "Reward, mean over images": {"reward/mean": "reward"},
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
}
STAGES = ("rollout", "score", "update", "publish")


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory, whole or not at all, and return its path.

    Raises:
        ConfigError: the directory holds no run.
        RunError: a file of the run is damaged; names it.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} holds no run: there is no config.yaml in it")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stage_ray.report"),
        autoescape=jinja2.select_autoescape(["html", "j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(_contents(run_dir))
    path = run_dir / "report.html"
    atomic_write(path, page)
    return path


def _contents(run_dir: Path) -> dict[str, Any]:
    """Everything the template shows."""
    config_text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(config_text)
    rows = read_steps(run_dir / METRICS_FILE)
    before = read_result(run_dir / "evaluation" / "before.json")
    after = read_result(run_dir / "evaluation" / "after.json")
    changed = changes(before, after) if before and after else {}
    pair = [(run_dir / "evaluation" / f"{name}.png", name.capitalize()) for name in ("before", "after")]
    return {
        "name": run_dir.resolve().name,
        "headline": _headline(before, after),
        "state": _state(rows, config, after is not None),
        "cards": _cards(rows, before.headline if before else "", changed),
        "evaluation": _evaluation_rows(before, after, changed) if before else [],
        "pair": _pictures(pair),
        "alarms": _alarms(read_steps(run_dir / ALARMS_FILE)),
        "charts": _charts(rows),
        "samples": _samples(run_dir),
        "config": config_text,
        "machine": read_json(run_dir / MACHINE_FILE) or machine_metadata(),
    }


def _headline(before: EvaluationResult | None, after: EvaluationResult | None) -> str:
    if before is None or before.headline_value is None:
        return "No held-out evaluation"
    then = after.metrics.get(before.headline) if after else None
    value = f"{before.headline_value:.3f}" + (f" → {then.value:.3f}" if then else " before training")
    return f"Held-out {before.headline} {value}"


def _state(rows: Sequence[dict[str, Any]], config: dict[str, Any], evaluated: bool) -> str:
    done, wanted = rows[-1]["step"] if rows else 0, config.get("steps", 0)
    if done < wanted:
        return f"{done} of {wanted} steps so far"
    evaluates = config.get("evaluation", {}).get("enabled", True)
    return f"{done} steps" + ("" if evaluated or not evaluates else ", not evaluated afterwards")


def _evaluation_rows(
    before: EvaluationResult, after: EvaluationResult | None, changed: Mapping[str, MetricValue]
) -> list[dict[str, Any]]:
    """A row for every metric of the benchmark, in its order."""
    return [
        {
            "metric": name.replace("_", " "),
            "images": metric.images,
            "before": metric,
            "after": after.metrics.get(name, "") if after else "",
            "change": _signed(changed[name]) if name in changed else "",
            "tone": _tone(changed.get(name)),
            "total": name == before.headline,
        }
        for name, metric in before.metrics.items()
    ]


def _signed(change: MetricValue) -> str:
    return str(change) if change.value < 0 else f"+{change}"


def _tone(change: MetricValue | None) -> str:
    """Colour of a change: none where it may be chance."""
    if change is None or not clear(change):
        return ""
    return "good" if change.value > 0 else "bad"


def _cards(rows: Sequence[dict[str, Any]], headline: str, changed: Mapping[str, MetricValue]) -> list[dict[str, str]]:
    cards = []
    if headline in changed:
        change = changed[headline]
        label = f"change of held-out {headline}" + (f", ±\u00a0{change.error:.3f}" if change.error is not None else "")
        cards.append({"label": label, "value": f"{change.value:+.3f}", "tone": _tone(change)})

    def known(name: str) -> list[float]:
        return [row[name] for row in rows if row.get(name) is not None]

    seconds, speeds, rewards = known("time/step_s"), sorted(known("images_per_s")), known("reward/mean")
    if rewards:
        window = max(1, min(10, len(rewards) // 2))
        first, last = sum(rewards[:window]) / window, sum(rewards[-window:]) / window
        label = f"training reward, first and last {window} steps"
        cards.append({"label": label, "value": f"{first:.2f} → {last:.2f}"})
    if speeds:
        cards.append({"label": "images a second, median", "value": f"{speeds[len(speeds) // 2]:.1f}"})
    if seconds:
        cards.append({"label": "minutes in training steps", "value": f"{sum(seconds) / 60:.1f}"})
    return cards


def _charts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Charts of the metrics that are there, scorers and stage times found by their names."""
    if not rows:
        return []
    steps = [row["step"] for row in rows]
    names = {name for row in rows for name in row}
    wanted = dict(CHARTS)
    derived = {"mean", "std", "informative"}
    scorers = sorted(name for name in names if name.startswith("reward/") and name.partition("/")[2] not in derived)
    if scorers:
        wanted = {"Reward, mean over images": wanted.pop("Reward, mean over images")} | {
            "Each scorer, mean over images": {name: name.partition("/")[2] for name in scorers},
            **wanted,
        }
    charts = []
    for title, columns in wanted.items():
        series: Series = {label: [row.get(name) for row in rows] for name, label in columns.items() if name in names}
        if series:
            charts.append({"title": title, "svg": Markup(curves(steps, series))})
    stages = {stage: [row.get(f"time/{stage}_s") for row in rows] for stage in STAGES if f"time/{stage}_s" in names}
    if stages:
        total = [row.get("time/step_s") for row in rows] if "time/step_s" in names else None
        charts.append({"title": "Seconds a step, by stage", "svg": Markup(stacked(steps, stages, total))})
    return charts


def _alarms(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per name of alarm, in the order they first rang."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["alarm"], []).append(row)
    return [
        {"name": name, "count": len(all_), "first": all_[0]["step"], "last": all_[-1]["step"], "text": all_[-1]["text"]}
        for name, all_ in groups.items()
    ]


def _samples(run_dir: Path) -> list[dict[str, str]]:
    """Sample sheets spread evenly over the run, first and last among them."""
    sheets = sorted((run_dir / "samples").glob("step-*.png"))
    if len(sheets) > MOST_SAMPLES:
        sheets = [sheets[round(i * (len(sheets) - 1) / (MOST_SAMPLES - 1))] for i in range(MOST_SAMPLES)]
    return _pictures([(sheet, f"After step {int(sheet.stem.partition('-')[2])}") for sheet in sheets])


def _pictures(files: Sequence[tuple[Path, str]]) -> list[dict[str, str]]:
    """PNG files that exist, as data URIs."""
    return [
        {"caption": caption, "source": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()}
        for path, caption in files
        if path.is_file()
    ]
