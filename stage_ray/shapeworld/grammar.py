"""ShapeWorld's prompts: GenEval's six tasks, in GenEval's record format, split by composition.

A record is `{"tag", "include", "exclude"?, "prompt"}`, as in GenEval's `evaluation_metadata.jsonl`; classes are shapes,
and counting prompts may name a colour too.

The held-out split asks for *compositions* that no training prompt or caption ever mentions: pairs (shape, colour),
pairs of shapes, pairs (shape, count), and triples (A, relation, B) together with their mirror images. Every single
shape, colour, relation and count is frequent in training. `single_object` has nothing to compose: its prompts are the
same in both splits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

from stage_ray.rewards.geneval_rules import RELATIONS, placement
from stage_ray.shapeworld.scene import COLORS, SHAPES, Scene, Shape, on_random_paper, random_places

Record = dict[str, Any]
Split = Literal["train", "heldout"]

TASKS: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MIRROR: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS: dict[int, str] = {2: "two", 3: "three", 4: "four"}
# Every (A, relation, B) over two different shapes.
_TRIPLES = [(a, relation, b) for a, b in itertools.permutations(SHAPES, 2) for relation in RELATIONS]

SPLIT_SEED = 20260
# Most prompts of a task in a prompt file, where there are more: hundreds of one task would drown the others.
LIMITS: dict[Split, dict[str, int]] = {
    "train": {"color_attr": 32},
    "heldout": {"counting": 20, "position": 32, "color_attr": 32},
}
# How often the RL prompt file holds a prompt of a task: tasks with few prompts would hardly be trained on.
TRAIN_REPEATS = {"two_object": 3, "colors": 2, "position": 2}


@cache
def held_out() -> frozenset[Any]:
    """The fixed compositions that training never mentions: 7 of 40 (shape, colour), 2 of 10 unordered pairs of shapes,
    3 of 15 (shape, count), and of the 80 triples (A, relation, B) the 16 over held-out pairs plus 16 others."""
    rng = np.random.default_rng(SPLIT_SEED)
    shapes, colors = rng.permutation(SHAPES).tolist(), rng.permutation(list(COLORS)).tolist()
    # No colour twice, and a shape at most twice: every shape and colour stays frequent in training.
    held: set[Any] = {(shapes[i % len(shapes)], colors[i]) for i in range(7)}
    pairs = {frozenset(shapes[:2]), frozenset(shapes[2:4])}
    held |= pairs | set(zip(rng.permutation(SHAPES).tolist(), NUMBERS, strict=False))
    held |= {triple for triple in _TRIPLES if frozenset(triple[::2]) in pairs}
    candidates = [triple for triple in _TRIPLES if triple not in held and triple[1] in ("left of", "above")]
    for index in rng.permutation(len(candidates))[:8]:
        first, relation, second = candidates[index]
        held |= {(first, relation, second), (second, MIRROR[relation], first)}
    return frozenset(held)


def item(kind: str, count: int = 1, color: str | None = None) -> Record:
    """One clause of a record: so many of a shape, of a colour where one is asked for."""
    return {"class": kind, "count": count} | ({"color": color} if color else {})


def make_record(tag: str, items: Sequence[Record], relation: str | None = None) -> Record:
    """The record of a caption over its items, in the caption's order; of two in a relation, the second comes first.

    Counting forbids one object more, as GenEval does.
    """
    record: Record = {"tag": tag, "include": list(items)}
    if relation is not None:
        first, second = items
        record["include"] = [second, first | {"position": [relation, 0]}]
    if tag == "counting":
        record["exclude"] = [item(items[0]["class"], items[0]["count"] + 1)]
    phrases = []  # "a ring", "an orange ring", "two red rings"
    for wanted in items:
        kind, count = wanted["class"], wanted["count"]
        words = " ".join(filter(None, (wanted.get("color"), kind if count == 1 else plural(kind))))
        phrases.append(f"{NUMBERS.get(count) or ('an' if words[0] in 'aeiou' else 'a')} {words}")
    return record | {"prompt": "a photo of " + f" {relation or 'and'} ".join(phrases)}


def plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def mentions_held_out(record: Record) -> bool:
    """Whether a record asks for at least one held-out composition."""
    include = record["include"]
    kinds = [wanted["class"] for wanted in include]
    asked: list[Any] = [frozenset(pair) for pair in itertools.combinations(kinds, 2)]
    for kind, wanted in zip(kinds, include, strict=True):
        asked += [(kind, wanted.get("color")), (kind, wanted["count"])]
        if "position" in wanted:
            relation, target = wanted["position"]
            asked.append((kind, relation, kinds[target]))
    return not held_out().isdisjoint(asked)


@cache
def _compositions(split: Split) -> dict[str, list[Record]]:
    """Every record of each task, in the order of TASKS, that belongs to a split. `single_object` belongs to both."""
    colored = [item(kind, color=color) for kind, color in itertools.product(SHAPES, COLORS)]
    # Only what is held out as a count: a held-out colour here would test two things at once.
    counted = [one for one in itertools.product(SHAPES, NUMBERS, (None, *COLORS)) if one[::2] not in held_out()]
    pairs = [(a, b) for a, b in itertools.permutations(colored, 2) if a["class"] != b["class"]]
    everything: dict[str, list[Record]] = {
        "single_object": [make_record("single_object", [item(kind)]) for kind in SHAPES],
        "two_object": [make_record("two_object", [item(a), item(b)]) for a, b in itertools.permutations(SHAPES, 2)],
        "counting": [make_record("counting", [item(*one)]) for one in counted],
        "colors": [make_record("colors", [one]) for one in colored],
        "position": [make_record("position", [item(a), item(b)], relation) for a, relation, b in _TRIPLES],
        "color_attr": [make_record("color_attr", [a, b]) for a, b in pairs if a["color"] != b["color"]],
    }
    return {
        tag: [one for one in records if tag == "single_object" or mentions_held_out(one) == (split == "heldout")]
        for tag, records in everything.items()
    }


def prompts(split: Split) -> list[Record]:
    """The prompt file of a split, always the same: about 340 records for training, 100 held out."""
    rng = np.random.default_rng(SPLIT_SEED + 1)
    result: list[Record] = []
    for tag, records in _compositions(split).items():
        keep = np.sort(rng.permutation(len(records))[: LIMITS[split].get(tag, len(records))])
        repeats = TRAIN_REPEATS.get(tag, 1) if split == "train" else 1
        result += [dict(records[index]) for index in keep for _ in range(repeats)]
    return result


def sample_record(rng: np.random.Generator, task_weights: dict[str, float], split: Split = "train") -> Record:
    """A random record of a split: first the task by its weight, then one of all its compositions, uniformly."""
    weights = np.asarray([task_weights.get(tag, 0.0) for tag in TASKS])
    records = _compositions(split)[rng.choice(TASKS, p=weights / weights.sum())]
    return records[int(rng.integers(len(records)))]


def sample_mixture(rng: np.random.Generator) -> Record:
    """A training caption beyond the six tasks: two or three kinds of object, each with or without number and colour, or
    two in a relation, like "a photo of two red rings and a square"."""
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


def sample_scene(
    record: Record, rng: np.random.Generator, *, avoid_held_out: bool = True, lattice: bool = False
) -> Scene:
    """A random scene that shows what `record` asks for, positions with a margin, and nothing else.

    Counted objects share one colour. With `avoid_held_out` a colour that the record leaves open completes no held-out
    (shape, colour), so that training pictures do not show what training captions may not mention.
    """
    wanted: list[tuple[str, str]] = []  # (kind, colour) of each object
    related: tuple[int, str, int] | None = None  # index of A, relation, index of B
    hidden = held_out() if avoid_held_out else frozenset()
    for index, clause in enumerate(record["include"]):
        kind = clause["class"]
        color = clause.get("color") or str(rng.choice([c for c in COLORS if (kind, c) not in hidden]))
        wanted += [(kind, color)] * clause["count"]
        if "position" in clause:
            related = (index, *clause["position"])
    while True:
        places = random_places(len(wanted), rng, lattice=lattice)
        shapes = [Shape(*look, *place) for look, place in zip(wanted, places, strict=True)]
        boxes = [shape.box for shape in shapes]
        # GenEval asks for one half.
        if related is None or placement(boxes[related[0]], boxes[related[2]])[related[1]] > 0.6:
            return on_random_paper(shapes, rng)
