"""What a bench says: one row a claim, with the limit that bounds it. A row never fails; it states a fact."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Unit = Literal["s", "ms", "MiB"]


@dataclass(frozen=True, slots=True)
class Row:
    """One claim: a ratio against a named baseline of the same run, its target, and how far the limit is.

    Attributes:
        name: ``bench/case/what``, unique in a run.
        ratio: what the claim is about; ``ratio_is`` says it in words ("times as fast").
        target: the ratio that was aimed for; reached from above or from below, as ``better`` says.
        baseline, ours: medians in ``unit``; ``baseline_is`` names what was measured for the first.
        limit: the least that is possible here, in ``unit``; ``limit_is`` says what sets it. None where nothing does.
        details: further measured numbers. Their names carry their units.
        notes: what a reader must know to judge the ratio.

    Example:
        >>> row = Row("a/b", 1.5, 2.0, "times as fast", "a loop", 3.0, 2.0, "s", limit=1.0, limit_is="a copy")
        >>> row.met, row.share_of_limit
        (False, 0.5)
    """

    name: str
    ratio: float
    target: float
    ratio_is: str
    baseline_is: str
    baseline: float
    ours: float
    unit: Unit = "s"
    better: Literal["higher", "lower"] = "higher"
    limit: float | None = None
    limit_is: str = ""
    details: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        """Whether the ratio is at least (or, where lower is better, at most) the target; a NaN never is."""
        return self.ratio >= self.target if self.better == "higher" else self.ratio <= self.target

    @property
    def share_of_limit(self) -> float | None:
        """Limit by ours: 1 is as good as this machine can do."""
        return None if self.limit is None else self.limit / self.ours

    def to_json(self) -> dict[str, Any]:
        """Everything above, in one flat object but for ``details`` and ``notes``."""
        data = asdict(self) | {"met": self.met, "share_of_limit": self.share_of_limit}
        return data | {"details": dict(self.details), "notes": list(self.notes)}


def median(facts: Iterable[Mapping[str, Any]], name: str) -> float:
    """Median of one number over the turns of a side.

    Example:
        >>> median([{"seconds": 1.0}, {"seconds": 9.0}, {"seconds": 2.0}], "seconds")
        2.0
    """
    return statistics.median(float(fact[name]) for fact in facts)
