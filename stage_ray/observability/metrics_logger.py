"""Where a run's numbers go: ``metrics.jsonl``, ``alarms.jsonl`` and, by the same names, trackers and Prometheus."""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from stage_ray.config import RunConfig
from stage_ray.config.hardware import machine_metadata
from stage_ray.config.schema import LogsConfig
from stage_ray.errors import RunError
from stage_ray.files import atomic_write
from stage_ray.observability.registry import ALARMS, PREFIX, find
from stage_ray.observability.trackers import TrackedRun, open_trackers
from stage_ray.observability.trackers.base import Tracker

METRICS_FILE = "metrics.jsonl"
ALARMS_FILE = "alarms.jsonl"
MACHINE_FILE = "machine.json"


class MetricsLogger:
    """Writes one JSON object per step, hands numbers and pictures to the run's trackers, and serves Prometheus.

    Invariant: ``metrics.jsonl`` holds whole lines with growing steps, whatever was killed when. A line is with the
    system before `step` returns; a half-written last line is dropped when a run goes on, and the lines of steps that
    will be trained again when the first of these is.

    ``step`` counts updates done, from 1, so a checkpoint of step 50 resumes with ``resume_step=50``. ``port``: of
    the Prometheus endpoint, or None.
    """

    def __init__(
        self, run_dir: Path, port: int | None, host: str, resume_step: int = 0, run: RunConfig | None = None
    ) -> None:
        """Bind the Prometheus endpoint to ``host`` and ``port`` (0: a free one; None: none), then open the files.

        ``resume_step`` is as in `rewind`; ``run`` names the trackers, and None is TensorBoard alone.

        Raises:
            RunError: the port is taken or the address is not this machine's.
        """
        self._run_dir, self._run = run_dir, run
        self._prometheus = None if port is None else PrometheusEndpoint(host, port)
        self.port = None if self._prometheus is None else self._prometheus.port
        self._trackers: list[Tracker] | None = None  # not opened yet
        self._replaces = True  # whether the next step takes the place of later ones
        atomic_write(run_dir / MACHINE_FILE, json.dumps(machine_metadata(), indent=1))
        self._keep(math.inf)  # all but what a crash left half-written
        self.rewind(resume_step)

    def step(self, step: int, metrics: Mapping[str, float | Sequence[str] | None]) -> None:
        """Record the metrics of one step. Numbers that are not finite become null; trackers get a list's length."""
        if self._replaces:
            self._keep(self._resume_step)
            self._replaces = False
        row: dict[str, Any] = {"step": step, **metrics}
        row |= {name: None for name, it in row.items() if isinstance(it, numbers.Real) and not math.isfinite(it)}
        self._append(METRICS_FILE, row)
        for tracker in self._opened():
            tracker.step(step, _tracked(row))
        if self._prometheus is not None:
            self._prometheus.serve({**dict.fromkeys(row), **_tracked(row), "step": step})

    def image(self, name: str, step: int, path: Path) -> None:
        """Hand a picture to the trackers: a PNG drawn after update ``step``."""
        for tracker in self._opened():
            tracker.image(name, step, path)

    def alarm(self, step: int, name: str, text: str) -> None:
        """Record one alarm of a step in ``alarms.jsonl``; Prometheus counts it."""
        self._append(ALARMS_FILE, {"step": step, "alarm": name, "text": text})
        if self._prometheus is not None:
            self._prometheus.alarms.labels(name).inc()

    def rewind(self, step: int) -> None:
        """Go on after ``step``: the next `step` first removes the lines of all later ones, which it replaces."""
        self._close_trackers()
        self._resume_step, self._replaces = step, True
        if self._prometheus is not None:
            self._prometheus.set("step", step)  # before the first update too: a run that hangs there must be seen

    def close(self) -> None:
        """Close the files and free the port."""
        self._close_trackers()
        if self._prometheus is not None:
            self._prometheus.close()

    def _opened(self) -> list[Tracker]:
        """The trackers, opened now if they are not: what they recorded of later steps gives way from here on."""
        if self._trackers is None:
            logs = LogsConfig() if self._run is None else self._run.logs
            rows, at = read_steps(self._run_dir / METRICS_FILE), self._resume_step
            tracked = TrackedRun(
                run_dir=self._run_dir,
                config={} if self._run is None else self._run.model_dump(mode="json"),
                step=at,
                history=[(row["step"], _tracked(row)) for row in rows if row["step"] <= at],
                pictures=_pictures(self._run_dir, at),
            )
            self._trackers = open_trackers(logs, tracked)
        return self._trackers

    def _close_trackers(self) -> None:
        trackers, self._trackers = self._trackers, None
        for tracker in trackers or ():
            tracker.close()

    def _keep(self, step: float) -> None:
        """Keep the whole lines up to ``step``."""
        for path in (self._run_dir / METRICS_FILE, self._run_dir / ALARMS_FILE):
            kept = [row for row in read_steps(path) if row["step"] <= step]
            atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept))

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self._run_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False, default=float) + "\n")  # float: of a NumPy number


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file with a ``step`` each, without a half-written last line; empty if there is no file.

    A line other than the last that is not such an object is a RunError.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
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


def _tracked(row: Mapping[str, Any]) -> dict[str, float]:
    """What trackers get of a row: its numbers, and the length of a list."""
    measured = {name: value for name, value in row.items() if value is not None and name != "step"}
    return {name: len(value) if isinstance(value, Sequence) else value for name, value in measured.items()}


def _pictures(run_dir: Path, step: int) -> list[tuple[str, int, Path]]:
    """Name, step and file of each picture that a run drew up to an update."""
    drawn = [("evaluation/before", 0, run_dir / "evaluation" / "before.png")] * (step > 0)
    samples = sorted((run_dir / "samples").glob("step-*.png"))
    drawn += [("samples", int(path.stem.removeprefix("step-")), path) for path in samples]
    return [(name, at, path) for name, at, path in drawn if at <= step and path.is_file()]


class PrometheusEndpoint:
    """One gauge a metric, such as ``stage_ray_reward_mean``, and the counter ``stage_ray_alarm_total{name="..."}``."""

    def __init__(self, host: str, port: int) -> None:
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self.alarms = Counter(f"{PREFIX}alarm", _help("alarm"), ["name"], registry=self._registry)
        for name in ALARMS:  # at 0 from the start: Prometheus sees no increase in a counter that begins at 1
            self.alarms.labels(name)
        try:
            self._server, _ = start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise RunError(
                f"cannot serve metrics on {host} port {port} ({error.strerror or error}); "
                "set cluster.metrics_port to 0 for a free port, or to null for none"
            ) from error
        self.port = self._server.server_port

    def serve(self, numbers: Mapping[str, float | None]) -> None:
        """Serve a step's numbers; those that an earlier step measured and this one did not are NaN.

        But for evaluations: theirs are served until the next one.
        """
        measured = {self.set(name, number) for name, number in numbers.items()}
        for served in self._gauges.keys() - measured:
            if not served.startswith(f"{PREFIX}eval_"):
                self._gauges[served].set(math.nan)

    def set(self, name: str, number: float | None) -> str:
        """Serve one number; None as NaN. The name by which it is served."""
        served = PREFIX + re.sub(r"\W", "_", name, flags=re.ASCII)  # Prometheus takes letters, digits and _ only
        if served not in self._gauges:
            self._gauges[served] = Gauge(served, _help(name), registry=self._registry)
        self._gauges[served].set(math.nan if number is None else number)
        return served

    def close(self) -> None:
        """Free the port."""
        self._server.shutdown()
        self._server.server_close()


def _help(name: str) -> str:
    metric = find(name)
    return metric.help if metric else f"{name} of the newest step"
