"""What a tracker is, and what it learns of a run when it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run as a tracker finds it: new, resumed, or gone back to a checkpoint.

    What was recorded of later steps is replaced by what comes now.
    """

    run_dir: Path  # a tracker may keep files of its own in it
    config: Mapping[str, Any] = field(default_factory=dict)  # resolved, plain values
    step: int = 0  # updates done
    history: Sequence[tuple[int, Mapping[str, float]]] = ()  # of the updates up to that one, for a new record
    pictures: Sequence[tuple[str, int, Path]] = ()  # name, step and PNG of each picture drawn until then


class Tracker(Protocol):
    """Shows a run's numbers and pictures, by the names of ``metrics.jsonl`` and of the picture files.

    It is made with a `TrackedRun` and its options (``logs.tracker_options``) as keywords, when the first number or
    picture comes, and again, after `close`, where a run goes back to a checkpoint. A class method ``check(**options)``,
    if there is one, runs before anything is started and raises a ConfigError.
    """

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The finite metrics of update ``step``, counted from 1."""

    def image(self, name: str, step: int, path: Path) -> None:
        """A PNG: ``samples``, ``evaluation/before`` or ``evaluation/after``, drawn after update ``step``. It may come
        after the metrics of later updates."""

    def close(self) -> None:
        """Write out what is left."""
