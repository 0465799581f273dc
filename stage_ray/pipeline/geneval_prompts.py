"""GenEval's prompts, made and not downloaded: the 553 of its test, and training prompts that hold none of them.

The rules are those of GenEval's ``create_prompts.py`` (arXiv 2310.11513), with its draws in its order; the mix of tasks
is that of Flow-GRPO's training set (arXiv 2505.05470), on which STAGE trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from stage_ray.errors import ConfigError
from stage_ray.rewards.coco import COLORS, OBJECTS
from stage_ray.rewards.geneval_rules import RELATIONS

SCHEME = "geneval:"  # of a location of prompts: geneval:test, geneval:train, geneval:train:COUNT
TEST_SEED, DRAWS_PER_TASK = 43, 100  # of the official file
TRAIN_SEED, TRAIN_PROMPTS = 0, 50_000
TRAIN_MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
NUMBERS = {2: "two", 3: "three", 4: "four"}

Record = dict[str, Any]


def geneval_prompts(location: str) -> list[Record]:
    """The records of ``geneval:test`` (553) or ``geneval:train[:COUNT]`` (50,000), always the same.

    Raises:
        ConfigError: the location is none of these.
    """
    split, _, count = location.removeprefix(SCHEME).partition(":")
    if split == "test" and not count:
        return list(_test())
    if split == "train" and (not count or (count.isascii() and count.isdigit() and int(count) > 0)):
        return list(_train(int(count or TRAIN_PROMPTS)))
    raise ConfigError(f"{location} is no set of prompts; there are geneval:test, geneval:train and geneval:train:COUNT")


@cache
def _test() -> tuple[Record, ...]:
    rng = np.random.default_rng(TEST_SEED)
    classes = rng.choice(len(OBJECTS), size=len(OBJECTS), replace=False)
    records = [_record("single_object", f"a photo of {_a(OBJECTS[i])}", [{"class": OBJECTS[i]}]) for i in classes]
    records += [draw(rng) for draw in TASKS.values() for _ in range(DRAWS_PER_TASK)]
    return tuple({json.dumps(record): record for record in records}.values())  # the first of equal ones


@cache
def _train(count: int) -> tuple[Record, ...]:
    """Prompts of `TRAIN_MIX`, shuffled; those of a task with few possible prompts recur."""
    rng = np.random.default_rng(TRAIN_SEED)
    tested = {record["prompt"] for record in _test()}
    ends = np.rint(np.cumsum([0, *TRAIN_MIX.values()]) / sum(TRAIN_MIX.values()) * count).astype(int)
    records: list[Record] = []
    for task, end in zip(TRAIN_MIX, ends[1:], strict=True):
        while len(records) < end:
            record = TASKS[task](rng)
            records += [record] if record["prompt"] not in tested else []
    return tuple(records[i] for i in rng.permutation(count))


def _record(tag: str, prompt: str, include: list[Record], **more: Any) -> Record:
    clauses = [{"class": clause["class"], "count": 1, **clause} for clause in include]
    return {"tag": tag, "include": clauses, **more, "prompt": prompt}


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _two_objects(rng: np.random.Generator) -> Record:
    a, b = (OBJECTS[i] for i in rng.choice(len(OBJECTS), size=2, replace=False))
    return _record("two_object", f"a photo of {_a(a)} and {_a(b)}", [{"class": a}, {"class": b}])


def _counting(rng: np.random.Generator) -> Record:
    name = OBJECTS[rng.choice(len(OBJECTS))]
    number = int(rng.integers(min(NUMBERS), max(NUMBERS), endpoint=True))
    plural = name + ("es" if name.endswith("s") else "s")
    include, exclude = ({"class": name, "count": number + more} for more in (0, 1))
    return _record("counting", f"a photo of {NUMBERS[number]} {plural}", [include], exclude=[exclude])


def _colors(rng: np.random.Generator) -> Record:
    name = OBJECTS[rng.choice(len(OBJECTS) - 1) + 1]  # all but the person, the first
    color = COLORS[rng.choice(len(COLORS))]
    return _record("colors", f"a photo of {_a(color)} {name}", [{"class": name, "color": color}])


def _position(rng: np.random.Generator) -> Record:
    a, b = (OBJECTS[i] for i in rng.choice(len(OBJECTS), size=2, replace=False))
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    include = [{"class": b}, {"class": a, "position": [relation, 0]}]
    return _record("position", f"a photo of {_a(a)} {relation} {_a(b)}", include)


def _color_attribution(rng: np.random.Generator) -> Record:
    a, b = (OBJECTS[i + 1] for i in rng.choice(len(OBJECTS) - 1, size=2, replace=False))
    first, second = (COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False))
    prompt = f"a photo of {_a(first)} {a} and {_a(second)} {b}"
    return _record("color_attr", prompt, [{"class": a, "color": first}, {"class": b, "color": second}])


TASKS: dict[str, Callable[[np.random.Generator], Record]] = {
    "two_object": _two_objects,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attribution,
}
"""Every task but ``single_object``, in the order in which the official file draws them."""
