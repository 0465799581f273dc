"""``report.html``: a run on one self-contained page, from whatever its directory holds, finished or not."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from stage_ray.config.hardware import machine_facts
from stage_ray.errors import ConfigError, RunError
from stage_ray.evaluation.result import EvaluationResult
from stage_ray.files import atomic_write
from stage_ray.observability.recorder import ALARMS_FILE, MACHINE_FILE, METRICS_FILE, read_steps
from stage_ray.report.charts import Series, curves, stacked
from stage_ray.report.comparison import OVERALL, Estimate, TaskComparison, compare

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
    before = _read_evaluation(run_dir / "evaluation" / "before.json")
    after = _read_evaluation(run_dir / "evaluation" / "after.json")
    exam = compare(before, after) if before else []
    overall = next((row for row in exam if row.task == OVERALL), None)
    return {
        "name": run_dir.resolve().name,
        "headline": _headline(overall),
        "state": _state(rows, config, after is not None),
        "cards": _cards(rows, overall),
        "exam": [_exam_row(row) for row in exam],
        "soft": _soft(before, after),
        "pair": _pictures(
            [(run_dir / "evaluation" / f"{name}.png", name.capitalize()) for name in ("before", "after")]
        ),
        "alarms": _alarms(read_steps(run_dir / ALARMS_FILE)),
        "charts": _charts(rows),
        "samples": _samples(run_dir),
        "config": config_text,
        "machine": _read_json(run_dir / MACHINE_FILE) or machine_facts(),
    }


def _headline(overall: TaskComparison | None) -> str:
    if overall is None:
        return "No held-out evaluation"
    if overall.after is None:
        return f"Held-out GenEval {overall.before.value:.3f} before training"
    return f"Held-out GenEval {overall.before.value:.3f} → {overall.after.value:.3f}"


def _state(rows: Sequence[dict[str, Any]], config: dict[str, Any], examined: bool) -> str:
    done, wanted = rows[-1]["step"] if rows else 0, config.get("steps", 0)
    if done < wanted:
        return f"{done} of {wanted} steps so far"
    evaluates = config.get("evaluation", {}).get("enabled", True)
    return f"{done} steps" + ("" if examined or not evaluates else ", not evaluated afterwards")


def _exam_row(row: TaskComparison) -> dict[str, Any]:
    return {
        "task": row.task.replace("_", " "),
        "images": row.images,
        "before": str(row.before),
        "after": str(row.after) if row.after else "",
        "change": f"{row.change.value:+.3f}" + str(row.change)[len(f"{row.change.value:.3f}") :] if row.change else "",
        "tone": _tone(row.change),
        "total": row.task == OVERALL,
    }


def _tone(change: Estimate | None) -> str:
    """Colour of a change: none where it may be chance."""
    if change is None or not change.clear:
        return ""
    return "good" if change.value > 0 else "bad"


def _soft(before: EvaluationResult | None, after: EvaluationResult | None) -> str:
    if before is None or before.soft is None:
        return ""
    return f"{before.soft:.3f}" + (f" → {after.soft:.3f}" if after and after.soft is not None else "")


def _cards(rows: Sequence[dict[str, Any]], overall: TaskComparison | None) -> list[dict[str, str]]:
    cards = []
    if overall and overall.change:
        change = overall.change
        label = "change of held-out GenEval" + (f", ±\u00a0{change.error:.3f}" if change.error is not None else "")
        cards.append({"label": label, "value": f"{change.value:+.3f}", "tone": _tone(change)})
    if rows:
        seconds = [row["time/step_s"] for row in rows if row.get("time/step_s") is not None]
        speeds = sorted(row["images_per_s"] for row in rows if row.get("images_per_s") is not None)
        rewards = [row["reward/mean"] for row in rows if row.get("reward/mean") is not None]
        window = max(1, min(10, len(rewards) // 2))
        if rewards:
            first, last = sum(rewards[:window]) / window, sum(rewards[-window:]) / window
            cards.append(
                {"label": f"training reward, first and last {window} steps", "value": f"{first:.2f} → {last:.2f}"}
            )
        if speeds:
            cards.append({"label": "images a second, median", "value": f"{speeds[len(speeds) // 2]:.1f}"})
        if seconds:
            cards.append({"label": "minutes in training steps", "value": f"{sum(seconds) / 60:.1f}"})
    return [{"tone": "", **card} for card in cards]


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


def _read_evaluation(path: Path) -> EvaluationResult | None:
    data = _read_json(path)
    try:
        return EvaluationResult.from_json(data) if data is not None else None
    except (KeyError, TypeError) as error:
        raise RunError(f"{path} is not an evaluation ({error}); remove it to write the report without it") from error


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not readable JSON ({error}); remove it to write the report without it") from error
