"""What every metric means, read from ``metrics.txt``, the one place that describes them.

Help texts of the Prometheus endpoint, ``stage-ray metrics`` and ``deploy/grafana/METRICS.md`` are made from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PREFIX = "stage_ray_"
RAY_PREFIX = "ray_"
HERE = Path(__file__).parent
TABLE = (HERE / "metrics.txt").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, or a family of them: ``reward/<scorer>`` stands for every scorer's."""

    name: str  # in ``metrics.jsonl`` and trackers, or of a worker's metric
    unit: str  # "share" is 0..1
    meaning: str  # one sentence without its full stop
    where: str  # what records it
    kind: str = "gauge"  # or a counter, which only grows while its process lives

    @property
    def worker(self) -> bool:
        """Whether the actors report it through Ray, with the labels ``role`` and ``worker``."""
        return self.name.startswith(f"{PREFIX}worker_")

    @property
    def prometheus(self) -> str:
        """Its name in PromQL, with ``<...>`` where the name of a family differs."""
        prefix, total = RAY_PREFIX if self.worker else PREFIX, "_total" * (self.kind == "counter")
        return prefix + re.sub(r"<\w+>|\W", lambda part: part[0] if "<" in part[0] else "_", self.name) + total

    @property
    def help(self) -> str:
        """Its line on a metrics endpoint."""
        return f"{self.meaning} [{self.unit}]"


def _read_table() -> Iterator[Metric]:
    """The metrics of ``metrics.txt``, which says how it is to be read."""
    where = kind = ""
    for line in TABLE.splitlines():
        if line.startswith("["):
            where, _, kind = line.strip("[]").partition(": ")
        elif not line.startswith("#"):
            name, unit, meaning = re.split(r" {2,}", line, maxsplit=2)
            yield Metric(name, unit, meaning, where, kind or "gauge")


_METRICS = tuple(_read_table())
RECORDED = tuple(metric for metric in _METRICS if not metric.worker and metric.where != "alarms")
"""What a run records: ``metrics.jsonl``, trackers and the driver's Prometheus endpoint."""
WORKER = tuple(metric for metric in _METRICS if metric.worker)
"""What every worker reports on its node's Ray metrics endpoint, with the labels ``role`` and ``worker``."""
ALARMS = {metric.name: metric.meaning for metric in _METRICS if metric.where == "alarms"}
"""The label ``name`` of ``stage_ray_alarm_total`` and what it means; see `stage_ray.observability.alarms`."""


def find(name: str) -> Metric | None:
    """The entry of a recorded metric: its own before that of a family, None where there is none."""

    def matches(metric: Metric) -> bool:
        family = metric.name.replace("<updates>", r"\d+").replace("<metric>", ".+")
        family = re.sub(r"<\w+>", "[^/]+", family)
        return re.fullmatch(family, name) is not None

    return min(filter(matches, RECORDED), key=lambda metric: metric.name != name, default=None)  # its own comes first


def markdown() -> str:
    """The metrics as ``deploy/grafana/METRICS.md`` has them."""
    import jinja2  # late: workers read the table only

    template = jinja2.Template((HERE / "metrics.md.j2").read_text(encoding="utf-8"), trim_blocks=True)
    return template.render(recorded=RECORDED, worker=WORKER, alarms=ALARMS)
