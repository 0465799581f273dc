"""ShapeWorld's prompts: GenEval's six tasks and more, in GenEval's record format, split by composition.

A record is `{"tag", "include", "exclude"?, "prompt"}`, as in GenEval's `evaluation_metadata.jsonl`; classes are shapes,
and counting prompts may name a colour too. Records beyond the six tasks may have more: a `background`, a `size` in a
clause, the class `shape` for any of them.

The held-out split asks for *compositions* that no training prompt or caption ever mentions: pairs (shape, colour),
pairs of shapes, pairs (shape, count), and triples (A, relation, B) together with their mirror images. Every single
shape, colour, relation and count is frequent in training. `single_object` has nothing to compose: its prompts are the
same in both splits. Training *pictures* may show what is held out, below captions that leave it open ("a red shape").
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

from stage_ray.rewards.geneval_rules import RELATIONS, placement
from stage_ray.shapeworld.scene import BACKGROUNDS, COLORS, SHAPES, Scene, Shape, on_random_paper, random_places

Record = dict[str, Any]
Split = Literal["train", "heldout"]

TASKS: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MIRROR: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS: dict[int, str] = {2: "two", 3: "three", 4: "four"}
ANY = "shape"  # as a class: whichever
SIZE_WORDS: tuple[str, str] = ("small", "large")
COMPARISONS: dict[str, tuple[str, str]] = {"smaller than": SIZE_WORDS, "larger than": (SIZE_WORDS[1], SIZE_WORDS[0])}
OPENERS: tuple[str, ...] = ("a photo of", "a picture of", "a drawing of", "an image showing")  # the first is GenEval's
REWORDED: dict[str, str] = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "over",
    "below": "under",
}
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


def item(kind: str, count: int = 1, color: str | None = None, size: str | None = None) -> Record:
    """One clause of a record: so many of a shape, of a colour and size where they are asked for."""
    return {"class": kind, "count": count} | ({"color": color} if color else {}) | ({"size": size} if size else {})


def make_record(
    tag: str,
    items: Sequence[Record],
    relation: str | None = None,
    background: str | None = None,
    opener: str = OPENERS[0],
    reworded: bool = False,
) -> Record:
    """The record of a caption over its items, in the caption's order; of two in a relation, the second comes first.

    A relation is one of RELATIONS or of COMPARISONS. Counting forbids one object more, as GenEval does. What is
    `reworded` says the same: "a ring in red to the left of a square".
    """
    joint, phrases = relation or "and", []
    for wanted in items:  # "a ring", "an orange ring", "two small red rings"
        kind, count = wanted["class"], wanted["count"]
        color, noun = wanted.get("color"), kind if count == 1 else plural(kind)
        before = (wanted.get("size") if relation not in COMPARISONS else None, None if reworded else color, noun)
        words = " ".join(filter(None, before)) + (f" in {color}" if reworded and color else "")
        phrases.append(f"{NUMBERS.get(count) or ('an' if words[0] in 'aeiou' else 'a')} {words}")
    record: Record = {"tag": tag, "include": list(items)}
    if relation in COMPARISONS:
        sizes = zip(items, COMPARISONS[relation], strict=True)
        record["include"] = [one | {"size": size} for one, size in sizes]
    elif relation is not None:
        first, second = items
        record["include"] = [second, first | {"position": [relation, 0]}]
        joint = REWORDED[relation] if reworded else relation
    if tag == "counting":
        record["exclude"] = [item(items[0]["class"], items[0]["count"] + 1)]
    prompt = f"{opener} " + f" {joint} ".join(phrases)
    if background is not None:
        record["background"] = background
        prompt += f" on {background} paper"
    return record | {"prompt": prompt}


def plural(kind: str) -> str:
    """Of a shape: "crosses", "rings"."""
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
    """A training caption beyond the six tasks, in one of several wordings: one to three kinds of object, each with or
    without number, colour and size, or two in a relation: "a drawing of two red rings and a small shape on mint paper".
    """

    def maybe(share: float, words: Sequence[str]) -> str | None:
        return str(rng.choice(words)) if rng.random() < share else None

    while True:
        kinds = [str(kind) for kind in rng.permutation(SHAPES)[: rng.choice([1, 2, 3], p=(0.2, 0.5, 0.3))]]
        kinds = [maybe(0.3, (ANY,)) or kind for kind in kinds]
        relation = maybe(0.55, (*RELATIONS, *COMPARISONS)) if len(kinds) == 2 else None
        sized = relation not in COMPARISONS and rng.random() < 0.4
        items = [
            item(
                kind,
                1 if relation or rng.random() < 0.75 else int(rng.integers(2, 5)),
                maybe(0.6, tuple(COLORS)),
                maybe(0.7, SIZE_WORDS) if sized else None,
            )
            for kind in kinds
        ]
        record = make_record(
            "mixture",
            items,
            relation,
            background=maybe(0.25, tuple(BACKGROUNDS)),
            opener=maybe(0.4, OPENERS) or OPENERS[0],
            reworded=rng.random() < 0.3,
        )
        if sum(one["count"] for one in items) <= max(NUMBERS) and not mentions_held_out(record):
            return record


def binding_prompts() -> list[Record]:
    """The second benchmark, always the same 96 prompts, 24 of each tag; no reward is ever given for them.

    Three coloured objects; two sizes; a background; held-out compositions of GenEval's tasks in other words. All but
    the last mention nothing held out: what is new in them is the whole.
    """
    rng = np.random.default_rng(SPLIT_SEED + 2)
    found: dict[str, Record] = {}  # by prompt
    others = prompts("heldout")
    for number, tag in enumerate(("three_objects", "relative_size", "background", "paraphrase"), start=1):
        while len(found) < 24 * number:
            kinds = [str(kind) for kind in rng.permutation(SHAPES)]
            colors = [str(color) for color in rng.permutation(list(COLORS))]
            if tag == "three_objects":
                record = make_record(tag, [item(*one) for one in zip(kinds[:3], (1, 1, 1), colors, strict=False)])
            elif tag == "relative_size":
                relation = str(rng.choice(["and", *COMPARISONS]))
                sizes = SIZE_WORDS[:: int(rng.choice([-1, 1]))]
                items = [item(kind, size=size) for kind, size in zip(kinds, sizes, strict=False)]
                record = make_record(tag, items, relation if relation in COMPARISONS else None)
            elif tag == "background":
                paper = str(rng.choice(list(BACKGROUNDS)))
                record = make_record(tag, [item(kinds[0], 1, colors[0])], background=paper)
            else:
                record = _in_other_words(others[int(rng.integers(len(others)))], str(rng.choice(OPENERS[1:])))
            if mentions_held_out(record) == (tag == "paraphrase"):
                found.setdefault(record["prompt"], record)
    return list(found.values())


def _in_other_words(record: Record, opener: str) -> Record:
    """What a record of the six tasks asks for, in the caption's order, with another opener and reworded."""
    items = [{key: value for key, value in clause.items() if key != "position"} for clause in record["include"]]
    relation = next((clause["position"][0] for clause in record["include"] if "position" in clause), None)
    again = make_record(record["tag"], items[:: -1 if relation else 1], relation, opener=opener, reworded=True)
    return again | {"tag": "paraphrase"}


def sample_scene(record: Record, rng: np.random.Generator, *, lattice: bool = False) -> Scene:
    """A random scene that shows what `record` asks for, positions with a margin, and nothing else.

    Objects of one clause share kind, colour and size. What the record leaves open may be anything, held out or not.
    """
    wanted: list[tuple[str, str]] = []  # (kind, colour) of each object
    sizes: list[str | None] = []
    related: tuple[int, str, int] | None = None  # index of A, relation, index of B
    for index, clause in enumerate(record["include"]):
        kind = str(rng.choice(SHAPES)) if clause["class"] == ANY else clause["class"]
        color = clause.get("color") or str(rng.choice(list(COLORS)))
        wanted += [(kind, color)] * clause["count"]
        sizes += [clause.get("size")] * clause["count"]
        if "position" in clause:
            related = (index, *clause["position"])
    while True:
        places = random_places(sizes, rng, lattice=lattice)
        shapes = [Shape(*look, *place) for look, place in zip(wanted, places, strict=True)]
        boxes = [shape.box for shape in shapes]
        # GenEval asks for one half.
        if related is None or placement(boxes[related[0]], boxes[related[2]])[related[1]] > 0.6:
            return on_random_paper(shapes, rng, record.get("background"))
