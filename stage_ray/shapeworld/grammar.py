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
from collections.abc import Sequence
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
# Every (A, relation, B) over two different shapes.
_TRIPLES = [(a, relation, b) for a, b in itertools.permutations(SHAPES, 2) for relation in RELATIONS]

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
    triples = {t for t in _TRIPLES if frozenset((t[0], t[2])) in shape_pairs}
    candidates = [t for t in _TRIPLES if t not in triples and t[1] in ("left of", "above")]
    for index in rng.permutation(len(candidates))[:8]:
        first, relation, second = candidates[index]
        triples |= {(first, relation, second), (second, MIRROR[relation], first)}
    return HeldOut(frozenset(shape_colors), frozenset(shape_pairs), frozenset(triples), frozenset(shape_counts))


def item(kind: str, count: int = 1, color: str | None = None) -> Record:
    """One clause of a record: so many of a shape, of a colour where one is asked for."""
    return {"class": kind, "count": count} | ({"color": color} if color else {})


def make_record(tag: str, items: Sequence[Record], relation: str | None = None) -> Record:
    """The record of a caption over its items, in the caption's order.

    With a relation the second item comes first, since a position points back: "a ring left of a square" includes
    [square, ring], the ring with ``"position": ["left of", 0]``. Counting forbids one object more, as GenEval does.

    Example:
        >>> make_record("two_object", [item("ring"), item("square", color="orange")])["prompt"]
        'a photo of a ring and an orange square'
    """
    record: Record = {"tag": tag, "include": list(items)}
    if relation is not None:
        first, second = items
        record["include"] = [second, first | {"position": [relation, 0]}]
    if tag == "counting":
        record["exclude"] = [item(items[0]["class"], items[0]["count"] + 1)]
    joint = f" {relation} " if relation else " and "
    return record | {"prompt": f"a photo of {joint.join(map(_phrase, items))}"}


def _phrase(wanted: Record) -> str:
    """`a ring`, `an orange ring`, `two red rings`."""
    kind, count = wanted["class"], wanted["count"]
    words = " ".join(filter(None, (wanted.get("color"), kind if count == 1 else plural(kind))))
    if count == 1:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"{NUMBERS[count]} {words}"


def plural(kind: str) -> str:
    """`rings`, `crosses`."""
    return kind + ("es" if kind.endswith("s") else "s")


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
    colored = [item(kind, color=color) for kind, color in itertools.product(SHAPES, COLORS)]
    counted = itertools.product(SHAPES, NUMBERS, (None, *COLORS))
    everything: dict[str, list[Record]] = {
        "two_object": [make_record("two_object", [item(a), item(b)]) for a, b in itertools.permutations(SHAPES, 2)],
        "counting": [
            make_record("counting", [item(kind, count, color)])
            for kind, count, color in counted
            # Only what is held out as a count: a held-out colour here would test two things at once.
            if (kind, color) not in held_out().shape_colors
        ],
        "colors": [make_record("colors", [one]) for one in colored],
        "position": [make_record("position", [item(a), item(b)], relation) for a, relation, b in _TRIPLES],
        "color_attr": [
            make_record("color_attr", [first, second])
            for first, second in itertools.permutations(colored, 2)
            if first["class"] != second["class"] and first["color"] != second["color"]
        ],
    }
    wanted = split == "heldout"
    chosen = {tag: tuple(r for r in records if mentions_held_out(r) == wanted) for tag, records in everything.items()}
    return {"single_object": tuple(make_record("single_object", [item(kind)]) for kind in SHAPES), **chosen}


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
        items = [item(*wanted) for wanted in zip(kinds, counts, colors, strict=True)]
        record = make_record("mixture", items, str(rng.choice(RELATIONS)) if related else None)
        if not mentions_held_out(record):
            return record


def relation_margin(a: tuple[float, float, float, float], b: tuple[float, float, float, float], relation: str) -> float:
    """How clearly box `a` stands in `relation` to box `b` (x0, y0, x1, y1, pixels) by GenEval's rule: it holds when the
    margin is above 0.5. The rule shrinks the centres' offset by a tenth of both boxes' sides, then normalises it."""
    box_a, box_b = np.asarray(a).reshape(2, 2), np.asarray(b).reshape(2, 2)
    offset = box_a.mean(axis=0) - box_b.mean(axis=0)
    slack = 0.1 * (np.ptp(box_a, axis=0) + np.ptp(box_b, axis=0))
    revised = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    dx, dy = revised / max(float(np.linalg.norm(offset)), 1e-6)
    return float({"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation])


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
    hidden = held_out().shape_colors if avoid_held_out else frozenset()
    for index, clause in enumerate(record["include"]):
        kind = clause["class"]
        color = clause.get("color") or str(rng.choice([c for c in COLORS if (kind, c) not in hidden]))
        wanted += [(kind, color)] * clause["count"]
        if "position" in clause:
            relation = (index, *clause["position"])
    while True:
        sizes = rng.uniform(*SIZES_BY_COUNT[len(wanted)], size=len(wanted))
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
