"""GenEval's rules, pure functions over detections: what a prompt's record asks for, and whether a picture shows it.

Strict verdict: GenEval's ``evaluate_images.py`` (arXiv 2310.11513). Soft score: the reward that Flow-GRPO
(arXiv 2505.05470) made of it and STAGE (arXiv 2509.25027) trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stage_ray.rewards.detection import Detection

RELATIONS = ("left of", "right of", "above", "below")
POSITION_SLACK = 0.1  # share of both boxes' sides by which centres must be apart to count
Objects = Mapping[str, Sequence[Detection]]  # class -> detections, most confident first, cut by confidence
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels


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


def is_nothing(value: Any) -> bool:
    """Whether a value is what JSON, pandas and CSV files hold where there is none: null, NaN, "", "None", "nan"."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "none", "nan", "null")
    return value is None or (isinstance(value, float) and math.isnan(value))


def _requirement(clause: Any, where: str, index: int) -> Requirement:
    if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str) or is_nothing(clause["class"]):
        raise ValueError(f'{where} has no "class"')
    count, color, position = (None if is_nothing(clause.get(k)) else clause[k] for k in ("count", "color", "position"))
    try:
        number = 1 if count is None else _whole(count)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: count {count!r} is not a whole number") from error
    if number < 1:
        raise ValueError(f"{where}: count {number} is below 1")
    if color is not None and not isinstance(color, str):
        raise ValueError(f'{where}: color {color!r} is not one text, such as "red"')
    if position is None:
        return Requirement(clause["class"], number, color)
    try:
        relation, target = position[0], _whole(position[1])
    except (TypeError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f'{where}: position {position!r} is not like ["left of", 0]') from error
    if relation not in RELATIONS:
        raise ValueError(f"{where}: relation {relation!r} is not one of {', '.join(RELATIONS)}")
    if not 0 <= target < index:
        raise ValueError(f"{where}: position refers to include[{target}], which does not come before it")
    return Requirement(clause["class"], number, color, relation, target)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError
    return int(value)


def placement(a: Box, b: Box) -> dict[str, float]:
    """How clearly `a` stands in each of RELATIONS to `b`, -1..1; above one half it does.

    The offset of the boxes' centres is shrunk by POSITION_SLACK times both boxes' sides, then divided by its full
    length.
    """
    boxes = np.asarray([a, b], np.float64).reshape(2, 2, 2)  # [box, corner, axis]
    offset = boxes[0].mean(axis=0) - boxes[1].mean(axis=0)  # from centre to centre, pixels
    sides = np.ptp(boxes, axis=1).sum(axis=0)  # of both boxes, by axis
    shrunk = np.maximum(np.abs(offset) - POSITION_SLACK * sides, 0.0) * np.sign(offset)
    on_top = np.all(np.abs(shrunk) < 1e-3)  # one box on the other
    dx, dy = (0.0, 0.0) if on_top else (shrunk / np.linalg.norm(offset)).tolist()
    return {"left of": -dx, "right of": dx, "above": -dy, "below": dy}  # y grows downwards


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` is, seen from `b`: none, one or two of RELATIONS."""
    return {name for name, clarity in placement(a.box, b.box).items() if clarity > 0.5}


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
        if not good and (need.color is not None or need.relation is not None):
            parts.append(0.0)
        if good and need.color is not None:
            colored = sum(one.color == need.color for one in found)
            parts.append(1.0 - abs(need.count - colored) / need.count)
            good = colored == need.count
        if good and need.relation is not None:
            targets = matched[need.target]
            good = targets is not None and not _misplaced(found, need.relation, targets)
            parts.append(1.0 if good else 0.0)
            if published and targets is not None and not good:  # the released code's second append
                parts.append(1.0)
        matched.append(found if good else None)
    return sum(parts) / len(parts)
