"""Where a run's numbers go: ``metrics.jsonl`` and ``alarms.jsonl``, and every tracker under the same names."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stage_ray.config.hardware import machine_facts
from stage_ray.errors import RunError
from stage_ray.files import atomic_write
from stage_ray.observability.trackers.base import Tracker
from stage_ray.observability.trackers.prometheus import PrometheusTracker
from stage_ray.observability.trackers.tensorboard import TensorBoardTracker

METRICS_FILE = "metrics.jsonl"
ALARMS_FILE = "alarms.jsonl"
MACHINE_FILE = "machine.json"


class MetricsLogger:
    """Writes one JSON object per step, and mirrors it to the trackers.

    Invariant: ``metrics.jsonl`` holds whole lines with growing steps, whatever was killed when. A line is flushed
    before `step` returns; a half-written last line is dropped when the file is opened again.

    ``step`` counts updates done, from 1, so a checkpoint of step 50 resumes with ``resume_step=50``.

    Attributes:
        port: of the Prometheus endpoint; None where there is none.

    Example:
        logger = MetricsLogger(Path("runs/a"), port=0, host="127.0.0.1")
        logger.step(1, {"reward/mean": 0.5, "alarms": []})   # and gauge stage_ray_reward_mean on logger.port
        logger.close()
    """

    def __init__(self, run_dir: Path, port: int | None, host: str, resume_step: int = 0) -> None:
        """Open the files and the endpoint.

        Args:
            run_dir: gets ``metrics.jsonl``, ``alarms.jsonl``, ``tensorboard/`` and ``machine.json`` (what ran it).
            port: Prometheus port; 0 picks a free one (see `port`), None serves nothing.
            host: address the endpoint binds to.
            resume_step: lines of later steps are removed; they will be trained again.

        Raises:
            RunError: the port is taken or the address is not this machine's.
        """
        self._trackers: list[Tracker] = [TensorBoardTracker(run_dir)]
        self.port: int | None = None
        if port is not None:
            prometheus = PrometheusTracker(host, port)
            self._trackers.append(prometheus)
            self.port = prometheus.port
        self._run_dir = run_dir
        atomic_write(run_dir / MACHINE_FILE, json.dumps(machine_facts(), indent=1))
        self._open(resume_step)

    def step(self, step: int, metrics: Mapping[str, float | str | Sequence[str] | None]) -> None:
        """Record the metrics of one step. Numbers that are not finite become null; trackers get a list's length."""
        row = {"step": step, **{name: _plain(value) for name, value in metrics.items()}}
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        self._metrics.flush()
        lengths = {name: len(value) for name, value in row.items() if isinstance(value, list)}
        tracked = {name: value for name, value in {**row, **lengths}.items() if not isinstance(value, str)}
        for tracker in self._trackers:
            tracker.step(step, tracked)

    def alarm(self, step: int, name: str, text: str) -> None:
        """Record one alarm of a step in ``alarms.jsonl`` and the trackers."""
        self._alarms.write(json.dumps({"step": step, "alarm": name, "text": text}) + "\n")
        self._alarms.flush()
        for tracker in self._trackers:
            tracker.alarm(name)

    def rewind(self, step: int) -> None:
        """Forget the steps after ``step``; they will be trained again."""
        self._metrics.close()
        self._alarms.close()
        self._open(step)

    def close(self) -> None:
        """Close the files and the trackers."""
        self._metrics.close()
        self._alarms.close()
        for tracker in self._trackers:
            tracker.close()

    def _open(self, step: int) -> None:
        for name in (METRICS_FILE, ALARMS_FILE):
            truncate_steps(self._run_dir / name, step)
        self._metrics = (self._run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._alarms = (self._run_dir / ALARMS_FILE).open("a", encoding="utf-8")
        for tracker in self._trackers:
            tracker.open(step)


def truncate_steps(path: Path, last_step: int) -> None:
    """Keep the lines of steps up to ``last_step``; drop later ones and what a crash left half-written."""
    if not path.exists():
        return
    kept = [row for row in read_steps(path) if row["step"] <= last_step]
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept))


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file with a ``step`` each, without a half-written last line; empty if there is no file.

    Raises:
        RunError: a line other than the last is not such an object.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise RunError(f"{path} line {number} is not an object with a step; remove the line") from error
        rows.append(row)
    return rows


def _plain(value: Any) -> Any:
    """A JSON value: numbers finite or None, sequences as lists."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise TypeError(f"a metric is a number, a text or a list of them, not {type(value).__name__}")
