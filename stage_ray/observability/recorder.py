"""Where a run's numbers go: ``metrics.jsonl``, TensorBoard events and a Prometheus endpoint, under the same names."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from torch.utils.tensorboard import SummaryWriter

from stage_ray.config.hardware import machine_facts
from stage_ray.errors import RunError
from stage_ray.files import atomic_write
from stage_ray.observability.registry import ALARMS, PREFIX, find, flat

METRICS_FILE = "metrics.jsonl"
ALARMS_FILE = "alarms.jsonl"
MACHINE_FILE = "machine.json"


class MetricsLogger:
    """Writes one JSON object per step, and mirrors it to TensorBoard and Prometheus.

    Invariant: ``metrics.jsonl`` holds whole lines with growing steps, whatever was killed when. A line is flushed
    before `step` returns; a half-written last line is dropped when the file is opened again.

    ``step`` counts updates done, from 1, so a checkpoint of step 50 resumes with ``resume_step=50``.

    Example:
        recorder = MetricsLogger(Path("runs/a"), port=0, host="127.0.0.1")
        recorder.step(1, {"reward/mean": 0.5, "alarms": []})   # and gauge stage_ray_reward_mean on recorder.port
        recorder.close()
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
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._alerts = Counter(f"{PREFIX}alarm", _help("alarm"), ["name"], registry=self._registry)
        for name in ALARMS:  # at 0 from the start: Prometheus sees no increase in a counter that begins at 1
            self._alerts.labels(name)
        self.port: int | None = None
        self._server: Any = None
        if port is not None:
            self._serve(host, port)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / MACHINE_FILE).write_text(json.dumps(machine_facts(), indent=1), encoding="utf-8")
        self._run_dir = run_dir
        self._open(resume_step)

    def step(self, step: int, metrics: Mapping[str, float | str | Sequence[str] | None]) -> None:
        """Record the metrics of one step. Numbers that are not finite become null; lists count in gauges."""
        row = {"step": step, **{name: _plain(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        measured = {_served(name) for name in row}
        for name, gauge in self._gauges.items():
            if name not in measured:  # what an earlier step had is not what this one has
                gauge.set(math.nan)
        for name, value in row.items():
            number = len(value) if isinstance(value, list) else value
            if isinstance(number, str):
                continue
            self._gauge(name).set(math.nan if number is None else number)
            if number is not None and name != "step":
                self._board.add_scalar(name, number, step)
        self._board.flush()

    def alarm(self, step: int, name: str, text: str) -> None:
        """Record one alarm of a step in ``alarms.jsonl`` and in the counter ``stage_ray_alarm_total{name="..."}``."""
        self._alarms.write(json.dumps({"step": step, "alarm": name, "text": text}) + "\n")
        self._alarms.flush()
        self._alerts.labels(name).inc()

    def rewind(self, step: int) -> None:
        """Forget the steps after ``step``; they will be trained again."""
        self._close_files()
        self._open(step)

    def close(self) -> None:
        """Close the files and free the port."""
        self._close_files()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _open(self, resume_step: int) -> None:
        for name in (METRICS_FILE, ALARMS_FILE):
            truncate_steps(self._run_dir / name, resume_step)
        self._file = (self._run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._alarms = (self._run_dir / ALARMS_FILE).open("a", encoding="utf-8")
        purge = resume_step + 1 if resume_step else None
        self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=purge)
        self._gauge("step").set(resume_step)  # before the first update too: who gets stuck there must be seen

    def _close_files(self) -> None:
        self._file.close()
        self._alarms.close()
        self._board.close()

    def _serve(self, host: str, port: int) -> None:
        try:
            self._server, _ = start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise RunError(
                f"cannot serve metrics on {host} port {port} ({error.strerror or error}); "
                "set cluster.metrics_port to 0 for a free port, or to null for none"
            ) from error
        self.port = self._server.server_port

    def _gauge(self, name: str) -> Gauge:
        served = _served(name)
        if served not in self._gauges:
            self._gauges[served] = Gauge(served, _help(name), registry=self._registry)
        return self._gauges[served]


def _served(name: str) -> str:
    return PREFIX + flat(name)


def _help(name: str) -> str:
    metric = find(name)
    return metric.help if metric else f"{name} of the newest step"


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
