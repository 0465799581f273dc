"""What a tracker is: it mirrors the rows of ``metrics.jsonl`` under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """Built by `MetricsLogger`, before anything is written; nothing is tracked before the first `open`."""

    def open(self, step: int) -> None:
        """Begin, or begin again, after ``step``: what was tracked of later steps will be tracked anew."""
        ...

    def step(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Track one step; None where a number is not finite."""
        ...

    def alarm(self, name: str) -> None:
        """Count an alarm."""
        ...

    def close(self) -> None:
        """Free files and ports."""
        ...
