"""Trackers: where a run's numbers and pictures go beside its own files. One file per tracker."""

from __future__ import annotations

import inspect
from typing import Any

from stage_ray.config.schema import LogsConfig
from stage_ray.errors import ConfigError
from stage_ray.observability.trackers.base import TrackedRun, Tracker
from stage_ray.registry import Registry

TRACKERS = Registry("stage_ray.observability.trackers", "Tracker", "tracker")


def check_trackers(logs: LogsConfig) -> None:
    """Raise a `ConfigError` for an unknown tracker, options that it does not take, or what its own `check` misses."""
    for name in logs.trackers:
        if (check := getattr(_find(logs, name), "check", None)) is not None:
            check(**logs.tracker_options.get(name, {}))


def open_trackers(logs: LogsConfig, run: TrackedRun) -> list[Tracker]:
    """Open every tracker, in the order of the config; raises what a tracker raises, and as `check_trackers`."""
    return [_find(logs, name)(run, **logs.tracker_options.get(name, {})) for name in logs.trackers]


def _find(logs: LogsConfig, name: str) -> Any:
    """The class of a tracker whose options fit its constructor."""
    kind, options = TRACKERS.find(name, "logs.trackers"), logs.tracker_options.get(name, {})
    if not all(callable(getattr(kind, method, None)) for method in ("step", "image", "close")):
        raise ConfigError(f"logs.trackers = {name!r} is not a class with the methods step, image and close")
    signature = inspect.signature(kind)
    try:
        signature.bind(None, **options)
    except TypeError as error:
        allowed = ", ".join(list(signature.parameters)[1:]) or "none"
        raise ConfigError(f"logs.tracker_options.{name} = {options}: {error}; allowed: {allowed}") from error
    return kind
