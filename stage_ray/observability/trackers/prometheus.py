"""A Prometheus endpoint in the driver, with the newest step."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from stage_ray.errors import RunError
from stage_ray.observability.registry import ALARMS, PREFIX, find


class PrometheusTracker:
    """One gauge a metric, such as ``stage_ray_reward_mean``, and the counter ``stage_ray_alarm_total{name="..."}``.

    Attributes:
        port: where it is served.
    """

    def __init__(self, host: str, port: int) -> None:
        """Bind the endpoint; port 0 picks a free one.

        Raises:
            RunError: the port is taken or the address is not this machine's.
        """
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._alarms = Counter(f"{PREFIX}alarm", _help("alarm"), ["name"], registry=self._registry)
        for name in ALARMS:  # at 0 from the start: Prometheus sees no increase in a counter that begins at 1
            self._alarms.labels(name)
        try:
            self._server, _ = start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise RunError(
                f"cannot serve metrics on {host} port {port} ({error.strerror or error}); "
                "set cluster.metrics_port to 0 for a free port, or to null for none"
            ) from error
        self.port = self._server.server_port

    def open(self, step: int) -> None:
        """Serve the step before the first update too: a run that hangs there must be seen."""
        self._set("step", step)

    def step(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Serve these numbers; those that an earlier step measured and this one did not are NaN."""
        for name in self._gauges.keys() | numbers.keys():
            self._set(name, numbers.get(name))

    def alarm(self, name: str) -> None:
        """As `Tracker.alarm`."""
        self._alarms.labels(name).inc()

    def close(self) -> None:
        """Free the port."""
        self._server.shutdown()
        self._server.server_close()

    def _set(self, name: str, number: float | None) -> None:
        if name not in self._gauges:
            served = PREFIX + re.sub(r"\W", "_", name)  # Prometheus takes letters, digits and _ only
            self._gauges[name] = Gauge(served, _help(name), registry=self._registry)
        self._gauges[name].set(math.nan if number is None else number)


def _help(name: str) -> str:
    metric = find(name)
    return metric.help if metric else f"{name} of the newest step"
