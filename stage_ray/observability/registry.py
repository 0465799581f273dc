"""What every metric means, read from ``metrics.txt``, the one place that describes them.

Help texts of the Prometheus endpoint, ``stage-ray metrics`` and ``deploy/grafana/METRICS.md`` are made from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PREFIX = "stage_ray_"
RAY_PREFIX = "ray_"
TABLE = Path(__file__).parent / "metrics.txt"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, or a family of them: ``reward/<scorer>`` stands for every scorer's.

    Attributes:
        name: in ``metrics.jsonl`` and trackers, or of a worker's metric.
        unit: of its value; "share" is 0..1.
        meaning: one sentence without its full stop.
        where: what records it.
        kind: gauge, or a counter, which only grows while its process lives.

    Example:
        >>> Metric("reward/<scorer>", "score", "Mean score", "learner").matches("reward/clip")
        True
    """

    name: str
    unit: str
    meaning: str
    where: str
    kind: str = "gauge"

    @property
    def worker(self) -> bool:
        """Whether the actors report it through Ray, with the labels ``role`` and ``worker``."""
        return self.name.startswith(f"{PREFIX}worker_")

    @property
    def prometheus(self) -> str:
        """Its name in PromQL, with ``<...>`` where the name of a family differs.

        Example:
            >>> Metric("time/step_s", "s", "Seconds", "driver").prometheus
            'stage_ray_time_step_s'
        """
        total = "_total" if self.kind == "counter" else ""
        if self.worker:
            return f"{RAY_PREFIX}{self.name}{total}"
        return PREFIX + re.sub(r"<\w+>|\W", lambda part: part[0] if "<" in part[0] else "_", self.name) + total

    @property
    def help(self) -> str:
        """Its line on a metrics endpoint."""
        return f"{self.meaning} [{self.unit}]"

    def matches(self, name: str) -> bool:
        """Whether ``name`` is this metric's, or one of its family."""
        family = r"\d+" if "<updates>" in self.name else r"[^/]+"
        return re.fullmatch(re.sub(r"<\w+>", lambda _: family, re.escape(self.name)), name) is not None


def _read_table() -> tuple[Metric, ...]:
    """The metrics of ``metrics.txt``, which says how it is to be read."""
    metrics, where, kind = [], "", ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            where, _, kind = line.strip("[]").partition(": ")
        elif not line.startswith("#"):
            name, unit, meaning = re.split(r" {2,}", line, maxsplit=2)
            metrics.append(Metric(name, unit, meaning, where, kind or "gauge"))
    return tuple(metrics)


_METRICS = _read_table()
RECORDED = tuple(metric for metric in _METRICS if not metric.worker and metric.where != "alarms")
"""What a run records: ``metrics.jsonl``, TensorBoard and the driver's Prometheus endpoint."""
WORKER = tuple(metric for metric in _METRICS if metric.worker)
"""What every worker reports on its node's Ray metrics endpoint, with the labels ``role`` and ``worker``."""

ALARMS = {metric.name: metric.meaning for metric in _METRICS if metric.where == "alarms"}
"""The label ``name`` of ``stage_ray_alarm_total`` and what it means; see `stage_ray.observability.alarms`."""


def find(name: str) -> Metric | None:
    """The entry of a recorded metric: its own before that of a family, None where there is none.

    Example:
        >>> find("reward/mean").unit, find("reward/clip").unit, find("reward") is None
        ('reward', 'score', True)
    """
    matching = [metric for metric in RECORDED if metric.matches(name)]
    return min(matching, key=lambda metric: metric.name != name, default=None)


def markdown() -> str:
    """The metrics as ``deploy/grafana/METRICS.md`` has them."""
    alarms = "".join(f"| `{name}` | {text} |\n" for name, text in ALARMS.items())
    return f"""# Metrics

Written by `stage-ray metrics --markdown`; source: `stage_ray/observability/metrics.txt`.

## Of a run

One row an update in `metrics.jsonl` and TensorBoard, and the newest of each on the driver's Prometheus endpoint
(`cluster.metrics_port`).

{_markdown_table(RECORDED, "metrics.jsonl")}
## Alarms

The label `name` of `stage_ray_alarm_total`; each has a rule in `alerts.yaml`. A run that ends because no group could be
scored (`no_valid_reward`) takes its endpoint with it before another scrape: alert on the job that failed, too.

| name | meaning |
| --- | --- |
{alarms}
## Of its workers

On the Ray metrics endpoint of each node, with the labels `role` (rollout, reward, learner) and `worker`.

{_markdown_table(WORKER, "in Ray")}"""


def print_table() -> None:
    """The metrics for people, on the terminal."""
    print(TABLE.read_text(encoding="utf-8"), end="")


def _markdown_table(metrics: tuple[Metric, ...], title: str) -> str:
    rows = [f"| {title} | Prometheus | kind | unit | meaning | recorded by |", "| --- | --- | --- | --- | --- | --- |"]
    for m in metrics:
        meaning = m.meaning.replace("|", "\\|")
        rows.append(f"| `{m.name}` | `{m.prometheus}` | {m.kind} | {m.unit} | {meaning} | {m.where} |")
    return "\n".join(rows) + "\n"
