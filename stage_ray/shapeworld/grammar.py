"""ShapeWorld's prompts: GenEval's six tasks, in GenEval's record format, split by composition.

A record is `{"tag", "include", "exclude"?, "prompt"}`, exactly as in GenEval's `evaluation_metadata.jsonl`. Two
liberties: classes are shapes, and counting prompts may also name a colour ("a photo of three red rings").

The held-out split asks for *compositions* that no training prompt or training caption ever mentions: pairs (shape,
colour), pairs of shapes, triples (A, relation, B) and pairs (shape, count). Every single shape, colour, relation and
count is frequent in training. A triple is held out together with its mirror image ("A left of B" and "B right of A").
`single_object` has nothing to compose: its five prompts are the same in both splits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from stage_ray.shapeworld.scene import (
    COLORS,
    LATTICE_SIZES,
    SHAPES,
    SIZES_BY_COUNT,
    Scene,
    Shape,
    place_squares,
    random_background,
)

Record = dict[str, Any]
Split = Literal["train", "heldout"]

TASKS: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
MIRROR: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS: dict[int, str] = {2: "two", 3: "three", 4: "four"}

SPLIT_SEED = 20260
TRAIN_COLOR_ATTR = 32  # prompts of the hundreds there are: otherwise they would drown the other tasks
# How often the RL prompt file holds a prompt of a task: tasks with few prompts would hardly be trained on.
TRAIN_REPEATS = {"two_object": 3, "colors": 2, "position": 2}
HELDOUT_PER_TASK = {"counting": 20, "position": 32, "color_attr": 32}  # the other tasks have fewer: all are taken


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The compositions that training never mentions. Shape pairs are unordered."""

    shape_colors: frozenset[tuple[str, str]]
    shape_pairs: frozenset[frozenset[str]]
    triples: frozenset[tuple[str, str, str]]  # (A, relation, B): "an A <relation> a B"
    shape_counts: frozenset[tuple[str, int]]


@cache
def held_out() -> HeldOut:
    """The fixed held-out compositions: 7 of 40 (shape, colour), 2 of 10 shape pairs, 3 of 15 (shape, count), and of the
    80 triples the 16 over held-out shape pairs plus 16 others."""
    rng = np.random.default_rng(SPLIT_SEED)
    shapes, colors = rng.permutation(SHAPES), rng.permutation(list(COLORS))
    # No colour twice, and a shape at most twice: every shape and colour stays frequent in training.
    shape_colors = {(str(shapes[i % len(shapes)]), str(colors[i])) for i in range(7)}
    shape_pairs = {frozenset(map(str, shapes[:2])), frozenset(map(str, shapes[2:4]))}
    counted = rng.permutation(SHAPES)
    shape_counts = {(str(counted[i]), count) for i, count in enumerate(NUMBERS)}
    triples = {t for t in _all_triples() if frozenset((t[0], t[2])) in shape_pairs}
    candidates = [t for t in _all_triples() if t not in triples and t[1] in ("left of", "above")]
    for index in rng.permutation(len(candidates))[:8]:
        first, relation, second = candidates[index]
        triples |= {(first, relation, second), (second, MIRROR[relation], first)}
    return HeldOut(frozenset(shape_colors), frozenset(shape_pairs), frozenset(triples), frozenset(shape_counts))


def _all_triples() -> Iterator[tuple[str, str, str]]:
    for first, second in itertools.permutations(SHAPES, 2):
        for relation in RELATIONS:
            yield first, relation, second


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def _record(tag: str, include: list[Record], words: str, exclude: list[Record] | None = None) -> Record:
    record: Record = {"tag": tag, "include": include}
    if exclude:
        record["exclude"] = exclude
    return {**record, "prompt": f"a photo of {words}"}


def single_object(kind: str) -> Record:
    """`a photo of a ring`."""
    return _record("single_object", [{"class": kind, "count": 1}], _article(kind))


def colors(kind: str, color: str) -> Record:
    """`a photo of a red ring`."""
    return _record("colors", [{"class": kind, "count": 1, "color": color}], _article(f"{color} {kind}"))


def two_object(first: str, second: str) -> Record:
    """`a photo of a ring and a square`."""
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    return _record("two_object", include, f"{_article(first)} and {_article(second)}")


def counting(kind: str, count: int, color: str | None = None) -> Record:
    """`a photo of three rings` or `a photo of three red rings`; `exclude` forbids one more, as GenEval does."""
    wanted: Record = {"class": kind, "count": count} | ({"color": color} if color else {})
    return _record("counting", [wanted], _phrase(wanted), exclude=[{"class": kind, "count": count + 1}])


def position(first: str, relation: str, second: str) -> Record:
    """`a photo of a ring left of a square`: `include` is [second, first], the first pointing at index 0."""
    include = [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]
    return _record("position", include, f"{_article(first)} {relation} {_article(second)}")


def color_attr(first: tuple[str, str], second: tuple[str, str]) -> Record:
    """`a photo of a red ring and a blue square`, from two pairs (shape, colour)."""
    include = [{"class": kind, "count": 1, "color": color} for kind, color in (first, second)]
    return _record("color_attr", include, " and ".join(map(_phrase, include)))


def mentions_held_out(record: Record) -> bool:
    """Whether a record asks for at least one held-out composition."""
    held, include = held_out(), record["include"]
    kinds = [wanted["class"] for wanted in include]
    if any((wanted["class"], wanted.get("color")) in held.shape_colors for wanted in include):
        return True
    if any((wanted["class"], wanted["count"]) in held.shape_counts for wanted in include):
        return True
    if any(frozenset(pair) in held.shape_pairs for pair in itertools.combinations(kinds, 2)):
        return True
    return any(
        "position" in wanted and (wanted["class"], wanted["position"][0], kinds[wanted["position"][1]]) in held.triples
        for wanted in include
    )


@cache
def _compositions(split: Split) -> dict[str, tuple[Record, ...]]:
    """Every record of each task that belongs to a split. `single_object` belongs to both."""
    pairs = list(itertools.product(SHAPES, COLORS))
    everything: dict[str, list[Record]] = {
        "two_object": [two_object(*kinds) for kinds in itertools.permutations(SHAPES, 2)],
        "counting": [
            counting(kind, count, color)
            for kind, count, color in itertools.product(SHAPES, NUMBERS, (None, *COLORS))
            # Only what is held out as a count: a held-out colour here would test two things at once.
            if (kind, color) not in held_out().shape_colors
        ],
        "colors": [colors(*pair) for pair in pairs],
        "position": [position(*triple) for triple in _all_triples()],
        "color_attr": [
            color_attr(first, second)
            for first, second in itertools.permutations(pairs, 2)
            if first[0] != second[0] and first[1] != second[1]
        ],
    }
    wanted = split == "heldout"
    chosen = {tag: tuple(r for r in records if mentions_held_out(r) == wanted) for tag, records in everything.items()}
    return {"single_object": tuple(map(single_object, SHAPES)), **chosen}


def _prompts(split: Split, limits: dict[str, int]) -> list[Record]:
    rng = np.random.default_rng(SPLIT_SEED + 1)
    result: list[Record] = []
    for tag in TASKS:
        records = _compositions(split)[tag]
        keep = np.sort(rng.permutation(len(records))[: limits.get(tag, len(records))])
        result += [dict(records[index]) for index in keep]
    return result


def training_prompts() -> list[Record]:
    """The RL training prompts: about 340 records, always the same, none mentioning a held-out composition; those of
    some tasks come `TRAIN_REPEATS` times."""
    records = _prompts("train", {"color_attr": TRAIN_COLOR_ATTR})
    return [record for record in records for _ in range(TRAIN_REPEATS.get(record["tag"], 1))]


def heldout_prompts() -> list[Record]:
    """The evaluation prompts: about 100 records, always the same. All but `single_object` ask for a held-out
    composition."""
    return _prompts("heldout", HELDOUT_PER_TASK)


def sample_record(rng: np.random.Generator, task_weights: dict[str, float], split: Split = "train") -> Record:
    """A random record of a split: first the task by its weight, then one of all its compositions, uniformly."""
    weights = np.asarray([task_weights.get(tag, 0.0) for tag in TASKS])
    records = _compositions(split)[TASKS[int(rng.choice(len(TASKS), p=weights / weights.sum()))]]
    return records[int(rng.integers(len(records)))]


def sample_mixture(rng: np.random.Generator) -> Record:
    """A caption beyond the six tasks, for pretraining: two or three kinds of object, each with or without a number
    and a colour, or two in a relation: "a photo of two red rings and a square". Mentions nothing held out."""
    while True:
        kinds = [str(kind) for kind in rng.permutation(SHAPES)[: rng.integers(2, 4)]]
        related = len(kinds) == 2 and rng.random() < 0.5
        counts = [1 if related or rng.random() < 0.75 else int(rng.integers(2, 4)) for _ in kinds]
        colors = [str(rng.choice(list(COLORS))) if rng.random() < 0.6 else None for _ in kinds]
        if sum(counts) > max(NUMBERS):
            continue
        include = [
            {"class": kind, "count": count} | ({"color": color} if color else {})
            for kind, count, color in zip(kinds, counts, colors, strict=True)
        ]
        phrases = [_phrase(item) for item in include]
        joint = " and "
        if related:
            relation = str(rng.choice(RELATIONS))
            joint, include = f" {relation} ", [include[1], include[0] | {"position": [relation, 0]}]
        record = _record("mixture", include, joint.join(phrases))
        if not mentions_held_out(record):
            return record


def _phrase(item: Record) -> str:
    """`a ring`, `a red ring`, `two red rings`."""
    kind, count, color = item["class"], item["count"], item.get("color")
    if count == 1:
        return _article(" ".join(filter(None, (color, kind))))
    return " ".join(filter(None, (NUMBERS[count], color, _plural(kind))))


def relation_margin(a: tuple[float, float, float, float], b: tuple[float, float, float, float], relation: str) -> float:
    """How clearly box `a` stands in `relation` to box `b` (x0, y0, x1, y1, pixels) by GenEval's rule: it holds when the
    margin is above 0.5. The rule shrinks the centres' offset by a tenth of both boxes' sides, then normalises it."""
    box_a, box_b = np.asarray(a).reshape(2, 2), np.asarray(b).reshape(2, 2)
    offset = box_a.mean(axis=0) - box_b.mean(axis=0)
    slack = 0.1 * (np.ptp(box_a, axis=0) + np.ptp(box_b, axis=0))
    revised = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    dx, dy = revised / max(float(np.linalg.norm(offset)), 1e-6)
    return float({"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation])


def _pick_color(kind: str, rng: np.random.Generator, avoid_held_out: bool) -> str:
    allowed = [c for c in COLORS if not (avoid_held_out and (kind, c) in held_out().shape_colors)]
    return str(rng.choice(allowed))


def sample_scene(
    record: Record, rng: np.random.Generator, *, avoid_held_out: bool = True, lattice: bool = False
) -> Scene:
    """A random scene that satisfies `record` and shows nothing beyond it.

    What the record leaves open (colours, places, sizes, background) is random; counted objects share one colour.
    With `avoid_held_out` an open colour never completes a held-out (shape, colour) pair, so that training pictures do
    not show what training captions may not mention. Positions hold by GenEval's rule with a margin.
    """
    wanted: list[tuple[str, str]] = []  # (kind, colour) of each object
    relation: tuple[int, str, int] | None = None  # index of A, relation, index of B
    for index, item in enumerate(record["include"]):
        color = item.get("color") or _pick_color(item["class"], rng, avoid_held_out)
        wanted += [(item["class"], color)] * item["count"]
        if "position" in item:
            relation = (index, item["position"][0], item["position"][1])
    low, high = SIZES_BY_COUNT[len(wanted)]
    while True:
        sizes = rng.uniform(low, high, size=len(wanted))
        if lattice:
            sizes = rng.choice(LATTICE_SIZES[len(wanted)], size=len(wanted))
        places = place_squares(sizes.tolist(), rng, lattice=lattice)
        shapes = tuple(Shape(*look, *place) for look, place in zip(wanted, places, strict=True))
        if relation is None:
            break
        first, name, second = relation
        if relation_margin(shapes[first].box, shapes[second].box, name) > 0.6:
            break
    return Scene(shapes, background=random_background(rng), seed=int(rng.integers(2**31)))
