"""GenEval as a reward: a detector looks at the picture, GenEval's rules judge what it saw.

Strict verdict: GenEval's ``evaluate_images.py`` (arXiv 2310.11513). Soft score: the reward that Flow-GRPO
(arXiv 2505.05470) made of it and STAGE (arXiv 2509.25027) trained on. The rules are pure functions over `Objects`: a
class and its detections, most confident first, already cut by confidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from stage_ray.errors import ConfigError, suggest
from stage_ray.records import Prompt
from stage_ray.registry import import_dotted
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.detection import Detection, Detector

Share = Annotated[float, Field(ge=0, le=1)]
RELATIONS = ("left of", "right of", "above", "below")
POSITION_SLACK = 0.1  # share of both boxes' sides by which centres must be apart to count
Objects = Mapping[str, Sequence[Detection]]


@dataclass(frozen=True, slots=True)
class Requirement:
    """One clause of a prompt's record.

    Attributes:
        label: the class.
        count: how many; for `include` at least, for `exclude` fewer than.
        color: every one of them in this colour, or None.
        relation: where they are seen from the objects of clause `target`, or None.
    """

    label: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int = 0


def requirements(record: Mapping[str, Any], key: str = "include") -> list[Requirement]:
    """Read `include` or `exclude`. Missing keys and what tables write for nothing are the same; counts may be texts.

    Raises:
        ValueError: the clauses cannot be evaluated; says which and why.
    """
    clauses = record.get(key)
    if is_nothing(clauses):
        return []
    if not isinstance(clauses, Sequence) or isinstance(clauses, str):
        raise ValueError(f'"{key}" is not a list, as in [{{"class": "ring", "count": 1}}]')
    return [_requirement(clause, f"{key}[{index}]", index) for index, clause in enumerate(clauses)]


def is_nothing(value: Any) -> bool:
    """Whether a value is what JSON, pandas and CSV files hold where there is none: null, NaN, "", "None", "nan"."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "none", "nan", "null")
    return value is None or (isinstance(value, float) and math.isnan(value))


def task_of(record: Mapping[str, Any]) -> str | None:
    """The record's ``tag``, None without one.

    Raises:
        ValueError: it is no text.
    """
    tag = record.get("tag")
    if is_nothing(tag):
        return None
    if not isinstance(tag, str):
        raise ValueError(f'"tag" {tag!r} is not one text, such as "counting"')
    return tag


def _requirement(clause: Any, where: str, index: int) -> Requirement:
    if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str) or is_nothing(clause["class"]):
        raise ValueError(f'{where} has no "class"')
    number = 1 if is_nothing(clause.get("count")) else _count(clause["count"], where)
    color, position = (None if is_nothing(clause.get(key)) else clause[key] for key in ("color", "position"))
    if color is not None and not isinstance(color, str):
        raise ValueError(f'{where}: color {color!r} is not one text, such as "red"')
    if position is None:
        return Requirement(clause["class"], number, color)
    try:
        relation, target = position[0], int(position[1])
        if isinstance(position[1], bool) or target != float(position[1]):
            raise TypeError
    except (TypeError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f'{where}: position {position!r} is not like ["left of", 0]') from error
    if relation not in RELATIONS:
        raise ValueError(f"{where}: relation {relation!r} is not one of {', '.join(RELATIONS)}")
    if not 0 <= target < index:
        raise ValueError(f"{where}: position refers to include[{target}], which does not come before it")
    return Requirement(clause["class"], number, color, relation, target)


def _count(value: Any, where: str) -> int:
    """A whole number from 1 on."""
    try:
        number = int(value)
        if isinstance(value, bool) or number != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: count {value!r} is not a whole number") from error
    if number < 1:
        raise ValueError(f"{where}: count {number} is below 1")
    return number


def relations(a: Detection, b: Detection, slack: float = POSITION_SLACK) -> set[str]:
    """Where `a` is, seen from `b`: none, one or two of RELATIONS.

    The offset of the boxes' centres is shrunk by `slack` times both boxes' sides, then divided by its full length; an
    axis counts where more than one half is left.
    """
    boxes = np.asarray([a.box, b.box], np.float64).reshape(2, 2, 2)  # [box, corner, axis]
    offset = boxes[0].mean(axis=0) - boxes[1].mean(axis=0)  # from centre to centre, pixels
    sides = np.ptp(boxes, axis=1).sum(axis=0)  # of both boxes, by axis
    shrunk = np.maximum(np.abs(offset) - slack * sides, 0.0) * np.sign(offset)
    if np.all(np.abs(shrunk) < 1e-3):  # one on top of the other
        return set()
    dx, dy = shrunk / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}  # y grows downwards
    return {name for name, true in holds.items() if true}


def _misplaced(found: Sequence[Detection], relation: str, targets: Sequence[Detection]) -> bool:
    return any(relation not in relations(one, target) for one in found for target in targets)


def strict_verdict(
    include: Sequence[Requirement], exclude: Sequence[Requirement], objects: Objects
) -> tuple[bool, str]:
    """GenEval's verdict and, where it is False, why: all of `include` and none of `exclude`.

    Of each class only the `count` most confident detections are looked at; more are no fault of their own.
    """
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []  # what each clause of `include` found; None where it is not met
    for need in include:
        found = objects.get(need.label, ())[: need.count]
        targets = matched[need.target] if need.relation is not None else ()
        fault = ""
        if len(found) < need.count:
            fault = f"expected {need.label}>={need.count}, found {len(found)}"
        elif need.color is not None and any(one.color != need.color for one in found):
            seen = ", ".join(str(one.color) for one in found)
            fault = f"expected {need.color} {need.label}>={need.count}, found {seen}"
        elif targets is None:
            fault = f"no target for {need.label} to be {need.relation}"
        elif need.relation is not None and _misplaced(found, need.relation, targets):
            fault = f"expected {need.label} {need.relation} target"
        matched.append(None if fault else found)
        reasons += [fault] if fault else []
    for need in exclude:
        number = len(objects.get(need.label, ()))
        if number >= need.count:
            reasons.append(f"expected {need.label}<{need.count}, found {number}")
    return not reasons, "; ".join(reasons)


def soft_score(include: Sequence[Requirement], objects: Objects, *, published: bool = False) -> float:
    """Mean over the parts of `include` that could be judged: counts, colours, positions. At most 1, may be below 0.

    All detections of a class count here, and `exclude` is ignored, so "one" means exactly one. With `published` it is
    the score as released: there a failed position check is given 0 *and* 1, so a wrong position costs half of what it
    should. The default gives it 0 alone.
    """
    parts: list[float] = []
    matched: list[Sequence[Detection] | None] = []
    for need in include:
        found = objects.get(need.label, ())
        parts.append(1.0 - abs(need.count - len(found)) / need.count)  # below 0 for many too many
        good = len(found) == need.count
        if not good:
            if need.color is not None or need.relation is not None:
                parts.append(0.0)
            matched.append(None)
            continue
        if need.color is not None:
            colored = sum(one.color == need.color for one in found)
            parts.append(1.0 - abs(need.count - colored) / need.count)
            good = colored == need.count
        if need.relation is not None and good:
            targets = matched[need.target]
            good = targets is not None and not _misplaced(found, need.relation, targets)
            parts.append(1.0 if good else 0.0)
            if published and targets is not None and not good:  # the released code's second append
                parts.append(1.0)
        matched.append(found if good else None)
    return sum(parts) / len(parts)


def judged_by(
    record: Mapping[str, Any], detector: Detector | type[Detector]
) -> tuple[list[Requirement], list[Requirement], str | None]:
    """What a record includes and excludes, and its task, in words that the detector has.

    Raises:
        ValueError: the record cannot be evaluated, or asks for what the detector never sees.
    """
    try:
        include, exclude, tag = requirements(record, "include"), requirements(record, "exclude"), task_of(record)
    except ValueError as error:
        raise ValueError(f"cannot be judged by GenEval's rules: {error}") from error
    if not include:
        raise ValueError('has no "include": GenEval needs to know what should be seen')
    for key, needs in (("include", include), ("exclude", exclude)):
        for index, need in enumerate(needs):
            for what, word in (("label", need.label), ("color", need.color)):
                known = getattr(detector, f"{what}s", None)  # of a detector that does not say, any word is taken
                if known is not None and word is not None and word not in known:
                    name = "class" if what == "label" else what
                    raise ValueError(
                        f"asks in {key}[{index}] for {name} {word!r}, unknown here; {suggest(word, known)}"
                    )
    return include, exclude, tag


def find_detector(name: str) -> type[Detector]:
    """The detector of a dotted path.

    Raises:
        ConfigError: nothing is there, or it has no method `detect`.
    """
    found = import_dotted(name, "detector")
    if not callable(found) or not callable(getattr(found, "detect", None)):
        raise ConfigError(f"detector {name!r} is no detector: it is not a class with a method detect(images)")
    return found


class GenEvalReward:
    """Scores by GenEval's rules; the strict verdict is in the details whatever the score is.

    Details of an image: ``verdict`` (bool, strict), ``soft`` (float), ``tag`` (the prompt's task or None) and
    ``reason`` (what is wrong with the image, "" where nothing is); or ``error`` alone where the prompt's record cannot
    be evaluated, and then the score is invalid.

    Example:
        >>> import numpy as np
        >>> from stage_ray.shapeworld.scene import Scene, Shape, render
        >>> reward = GenEvalReward("stage_ray.shapeworld.detector.ShapeDetector")
        >>> picture = render(Scene((Shape("ring", "red", cx=32.0, cy=32.0, size=30.0),)))
        >>> record = {"tag": "single_object", "include": [{"class": "ring", "count": 1}]}
        >>> reward.score(picture[None], [Prompt(0, "a photo of a ring", record)]).details[0]["verdict"]
        True
    """

    def __init__(
        self,
        detector: str,
        score: Literal["soft", "strict", "soft_published"] = "soft",
        threshold: Share = 0.3,
        counting_threshold: Share = 0.9,
        max_per_class: Annotated[int, Field(ge=1)] = 16,
    ) -> None:
        """Build the detector.

        Args:
            detector: dotted path of a `Detector` class; built without arguments.
            score: ``soft``; ``strict`` (0 or 1); or ``soft_published``, soft with the released code's error.
            threshold: confidence above which a detection counts. The defaults are GenEval's.
            counting_threshold: the same, for prompts with the tag ``counting``.
            max_per_class: most confident detections of a class that are looked at.
        """
        self._detector: Detector = find_detector(detector)()
        self._score = score
        self._threshold, self._counting_threshold = threshold, counting_threshold
        self._max_per_class = max_per_class

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt's record."""
        seen = self._detector.detect(images)
        details = tuple(self._judge(prompt, found) for prompt, found in zip(prompts, seen, strict=True))
        key = "verdict" if self._score == "strict" else self._score  # verdicts are 0 or 1
        scores = np.asarray([detail.get(key, np.nan) for detail in details], np.float32)  # NaN: could not be judged
        for detail in details:
            detail.pop("soft_published", None)  # a score of its own, and not for people
        return RewardOutput(scores, np.isfinite(scores), details)

    @classmethod
    def check(cls, prompts: Sequence[Prompt], detector: str, **options: Any) -> Iterator[tuple[Prompt, str]]:
        """The prompts that it could not judge, each with why; see `Reward.check`."""
        eyes = find_detector(detector)
        for prompt in prompts:
            try:
                judged_by(prompt.record, eyes)
            except ValueError as error:
                yield prompt, str(error)

    def _judge(self, prompt: Prompt, found: Sequence[Detection]) -> dict[str, Any]:
        try:
            include, exclude, tag = judged_by(prompt.record, self._detector)
        except ValueError as error:
            return {"error": f"prompt {prompt.text!r} {error}"}
        threshold = self._counting_threshold if tag == "counting" else self._threshold
        seen: dict[str, list[Detection]] = {}  # class -> its detections
        for one in sorted(found, key=lambda detection: -detection.confidence):  # most confident first
            if one.confidence > threshold:
                seen.setdefault(one.label, []).append(one)
        objects = {label: group[: self._max_per_class] for label, group in seen.items()}
        verdict, reason = strict_verdict(include, exclude, objects)
        return {
            "verdict": verdict,
            "soft": soft_score(include, objects),
            "soft_published": soft_score(include, objects, published=True),
            "tag": tag,
            "reason": reason,
        }
