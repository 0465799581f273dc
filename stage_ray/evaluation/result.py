"""What an evaluation says: one score, its standard error, its parts, and the verdict on every image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One task of a suite.

    Attributes:
        score: mean strict correctness over its judged images, 0..1.
        standard_error: of `score`; prompts are the independent units, since images of one prompt are alike. None where
            a single image says nothing about the spread.
        prompts: prompts with at least one judged image.
        images: judged images.
    """

    score: float
    standard_error: float | None
    prompts: int
    images: int


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The result of one sitting of a suite; JSON-able.

    Attributes:
        suite: name of the suite.
        overall: mean over tasks of their scores, 0..1; None where no scorer gives strict verdicts.
        standard_error: of `overall`.
        tasks: by the prompts' ``tag``; "all" for prompts without one.
        soft: mean soft score, None as `overall`.
        scores: mean of every scorer, by its column; None where it scored nothing.
        prompts: prompts asked.
        images: images drawn.
        invalid: images without a usable strict verdict; they count in no mean.
        verdicts: one mapping an image: ``prompt_index``, ``prompt``, ``task``, ``image``, ``correct``, ``soft``,
            ``reason`` and ``scores``.

    Example:
        >>> result = EvaluationResult("geneval", 0.5, 0.1, {"colors": TaskScore(0.5, 0.1, 8, 32)}, 0.7)
        >>> EvaluationResult.from_json(result.to_json()) == result
        True
    """

    suite: str
    overall: float | None
    standard_error: float | None
    tasks: Mapping[str, TaskScore]
    soft: float | None
    scores: Mapping[str, float | None] = field(default_factory=dict)
    prompts: int = 0
    images: int = 0
    invalid: int = 0
    verdicts: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data without NaN, for ``json.dump``."""
        return {**asdict(self), "verdicts": [dict(verdict) for verdict in self.verdicts]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvaluationResult:
        """Read `to_json`'s data; keys that others added beside it are passed over.

        Raises:
            KeyError: a key is missing.
        """
        mine = {item.name: data[item.name] for item in fields(cls)}
        tasks = {name: TaskScore(**task) for name, task in mine["tasks"].items()}
        return cls(**{**mine, "tasks": tasks, "verdicts": tuple(mine["verdicts"])})
