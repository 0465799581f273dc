"""What a bench is, and what it says: one row a claim, with the limit that bounds it."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from stage_ray.bench.timing import Measurement, Variant, interleave
from stage_ray.config import RunConfig
from stage_ray.config.load import validate_config
from stage_ray.observability.progress import Progress


@dataclass(frozen=True, slots=True)
class Row:
    """One claim: a ratio against a named baseline of the same run, its target, and how far the limit is. Never fails.

    Attributes:
        name: ``bench/case/what``, unique in a run.
        target: the ratio that was aimed for; reached from above or from below, as ``better`` says.
        baseline, ours: medians in ``unit``; ``baseline_is`` names what was measured for the first.
        ratio_is: the ratio in words ("times as fast").
        better: where ``higher``, the ratio is baseline by ours; where ``lower``, ours by baseline.
        limit: the least that is possible here, in ``unit``; ``limit_is`` says what sets it. None where nothing does.
        details: further measured numbers. Their names carry their units.
        notes: what a reader must know to judge the ratio.

    Example:
        >>> row = Row("a/b", 2.0, 3.0, 2.0, "times as fast", "a loop", limit=1.0, limit_is="a copy")
        >>> row.ratio, row.met, row.share_of_limit
        (1.5, False, 0.5)
    """

    name: str
    target: float
    baseline: float
    ours: float
    ratio_is: str
    baseline_is: str
    unit: Literal["s", "ms", "MiB"] = "s"
    better: Literal["higher", "lower"] = "higher"
    limit: float | None = None
    limit_is: str = ""
    details: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def ratio(self) -> float:
        """What the claim is about."""
        return self.baseline / self.ours if self.better == "higher" else self.ours / self.baseline

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
        return asdict(self) | {"ratio": self.ratio, "met": self.met, "share_of_limit": self.share_of_limit}


class Bench(ABC):
    """A comparison of variants: a subclass declares them, its targets and its limits; everything else is here.

    Args:
        device: cpu or cuda.
        quick: small sizes and few repeats, to see that it works; the ratios are then no claims.
    """

    def __init__(self, *, device: str, quick: bool, progress: Progress) -> None:
        self.device, self.quick, self.progress = device, quick, progress

    @abstractmethod
    def rows(self) -> list[Row]:
        """Measure with `interleave`, and state each claim."""

    def interleave(
        self, title: str, variants: Sequence[Variant], *, repeats: int, warmups: int = 1
    ) -> dict[str, list[Measurement]]:
        """`stage_ray.bench.timing.interleave`, shown as ``title``."""
        return interleave(variants, repeats=repeats, warmups=warmups, progress=self.progress, title=title)


def median(trials: Sequence[Measurement], name: str) -> float:
    """Median of one number over the trials of a variant.

    Example:
        >>> median([{"seconds": 1.0}, {"seconds": 9.0}, {"seconds": 2.0}], "seconds")
        2.0
    """
    return statistics.median(float(trial[name]) for trial in trials)


def bench_run(model: str = "none", **sections: Any) -> RunConfig:
    """A run's config with the defaults everywhere but in ``sections``; it names no prompts and evaluates nothing."""
    data = {
        "steps": 1000,
        "prompts": {"train": "none"},
        "policy": {"path": model},
        "rewards": [{"type": "geneval"}],
        "evaluation": {"enabled": False},
    }
    return validate_config(data | sections)
