"""Trackers: where a run's numbers and pictures go beside its own files. One file per tracker; `build` opens them."""

from stage_ray.observability.trackers.base import TrackedRun
from stage_ray.observability.trackers.build import check_trackers, open_trackers

__all__ = ["TrackedRun", "check_trackers", "open_trackers"]
