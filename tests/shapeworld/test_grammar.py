"""The grammar's promises: GenEval's format, splits that share no composition, scenes that keep what records ask."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from stage_ray.rewards.detection import Detection
from stage_ray.rewards.geneval_rules import RELATIONS, relations
from stage_ray.shapeworld.grammar import (
    MIRROR,
    NUMBERS,
    TASKS,
    TRAIN_REPEATS,
    Record,
    binding_prompts,
    held_out,
    item,
    make_record,
    mentions_held_out,
    prompts,
    sample_mixture,
    sample_record,
    sample_scene,
)
from stage_ray.shapeworld.scene import (
    COLORS,
    IMAGE_SIZE,
    MIN_BORDER,
    MIN_GAP,
    SHAPES,
    Scene,
    boxes_apart,
    random_scene,
)


def compositions(records: list[Record]) -> set[object]:
    """Everything that records compose, in words of its own, independent of `mentions_held_out`."""
    found: set[object] = set()
    for record in records:
        include = record["include"]
        for wanted in include:
            if "color" in wanted:
                found.add((wanted["class"], wanted["color"]))
            if record["tag"] == "counting":
                found.add((wanted["class"], wanted["count"]))
            if "position" in wanted:
                relation, target = wanted["position"]
                other = include[target]["class"]
                found |= {(wanted["class"], relation, other), (other, MIRROR[relation], wanted["class"])}
        if len(include) == 2:
            found.add(frozenset(wanted["class"] for wanted in include))
    return found


def held_out_compositions() -> set[object]:
    return set(held_out())


def test_no_training_prompt_or_caption_mentions_a_held_out_composition():
    rng = np.random.default_rng(0)
    captions = [sample_record(rng, dict.fromkeys(TASKS, 1.0)) for _ in range(4000)]
    assert compositions(prompts("train") + captions).isdisjoint(held_out_compositions())


def test_every_held_out_prompt_asks_for_a_held_out_composition_except_those_that_compose_nothing():
    for record in prompts("heldout"):
        asked = bool(compositions([record]) & held_out_compositions())
        assert asked == mentions_held_out(record) == (record["tag"] != "single_object")


def test_about_a_fifth_of_each_kind_of_composition_is_held_out():
    held = held_out()
    triples = {one for one in held if isinstance(one, tuple) and len(one) == 3}
    assert sum(isinstance(one, frozenset) for one in held) == 2  # of ten pairs of shapes
    assert sum(isinstance(one, tuple) and one[1] in COLORS for one in held) == 7  # of 40 (shape, colour)
    assert sum(isinstance(one, tuple) and one[1] in NUMBERS for one in held) == 3  # of 15 (shape, count)
    assert len(triples) == 32 and all((b, MIRROR[r], a) in triples for a, r, b in triples)
    assert len(held) == 2 + 7 + 3 + 32


def test_every_shape_color_relation_and_count_is_frequent_in_training():
    words = Counter(word for record in prompts("train") for word in record["prompt"].split())
    for color in COLORS:
        assert words[color] >= 15
    for shape in SHAPES:
        assert words[shape] + words[shape + "s"] + words[shape + "es"] >= 30
    for word in (*NUMBERS.values(), *(relation.split()[0] for relation in RELATIONS)):
        assert words[word] >= 8


def test_prompt_lists_are_the_same_every_time_and_repeat_only_what_they_mean_to():
    for split, repeats in (("train", TRAIN_REPEATS), ("heldout", {})):
        records = prompts(split)
        assert records == prompts(split)
        assert {record["tag"] for record in records} == set(TASKS)
        times = Counter(record["prompt"] for record in records)
        assert all(times[record["prompt"]] == repeats.get(record["tag"], 1) for record in records)


def test_captions_beyond_the_six_tasks_mention_nothing_held_out_and_can_be_drawn():
    rng = np.random.default_rng(1)
    records = [sample_mixture(rng) for _ in range(500)]
    assert not any(mentions_held_out(record) for record in records)
    assert len({record["prompt"] for record in records}) > 400
    for record in records[:100]:
        scene = sample_scene(record, rng, lattice=True)
        assert len(scene.shapes) == sum(item["count"] for item in record["include"])
        assert all(shape.cx % 4 == 0 and shape.cy % 4 == 0 for shape in scene.shapes)


def test_records_have_the_format_of_geneval():
    assert make_record("colors", [item("circle", color="orange")]) == {
        "tag": "colors",
        "include": [{"class": "circle", "count": 1, "color": "orange"}],
        "prompt": "a photo of an orange circle",
    }
    assert make_record("counting", [item("cross", 3)]) == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "a photo of three crosses",
    }
    assert make_record("position", [item("ring"), item("square")], "left of") == {
        "tag": "position",
        "include": [{"class": "square", "count": 1}, {"class": "ring", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a ring left of a square",
    }


def satisfies(scene: Scene, record: Record) -> bool:
    """The record, checked against the scene itself."""
    wanted = Counter({(w["class"], w.get("color")): w["count"] for w in record["include"]})
    for (kind, color), count in wanted.items():
        if sum(s.kind == kind and color in (None, s.color) for s in scene.shapes) != count:
            return False
    if len(scene.shapes) != sum(wanted.values()):
        return False
    for clause in record["include"]:
        if "position" in clause:
            relation, target = clause["position"]
            seen = {shape.kind: Detection(shape.kind, 1.0, shape.box) for shape in scene.shapes}
            if relation not in relations(seen[clause["class"]], seen[record["include"][target]["class"]]):
                return False
    return True


@pytest.mark.parametrize("record", prompts("heldout")[::3] + prompts("train")[::12], ids=lambda r: r["prompt"][11:])
def test_a_sampled_scene_shows_what_its_record_asks_and_nothing_else(record: Record):
    rng = np.random.default_rng(1)
    assert all(satisfies(sample_scene(record, rng), record) for _ in range(10))


def test_training_scenes_show_every_held_out_shape_and_color_below_captions_that_leave_it_open():
    rng = np.random.default_rng(2)
    shown: set[object] = set()
    for _ in range(500):
        record = sample_mixture(rng)
        shown |= {(shape.kind, shape.color) for shape in sample_scene(record, rng).shapes}
        assert compositions([record]).isdisjoint(held_out_compositions())
    assert {one for one in held_out() if isinstance(one, tuple) and one[1] in COLORS} <= shown


def test_the_second_benchmark_mentions_what_is_held_out_only_in_other_words_than_the_first():
    records = binding_prompts()
    assert records == binding_prompts() and len({record["prompt"] for record in records}) == len(records) == 96
    assert Counter(r["tag"] for r in records) == dict.fromkeys(
        ("three_objects", "relative_size", "background", "paraphrase"), 24
    )
    assert all(mentions_held_out(record) == (record["tag"] == "paraphrase") for record in records)
    known = {record["prompt"] for record in prompts("train") + prompts("heldout")}
    assert known.isdisjoint(record["prompt"] for record in records)


@pytest.mark.parametrize("lattice", [False, True])
def test_a_scene_has_the_sizes_and_the_paper_that_its_record_asks_for(lattice: bool):
    rng = np.random.default_rng(4)
    record = make_record("mixture", [item("ring"), item("cross")], "larger than", background="mint")
    assert record["prompt"] == "a photo of a ring larger than a cross on mint paper"
    for _ in range(20):
        scene = sample_scene(record, rng, lattice=lattice)
        ring, cross = scene.shapes
        assert ring.size > 1.2 * cross.size and scene.background == "mint"


def test_other_words_ask_for_the_same():
    items = [item("ring", 1, "red"), item("square", size="small")]
    plain, reworded = (
        make_record("mixture", items, "left of", opener="a drawing of", reworded=reworded) for reworded in (False, True)
    )
    assert plain["prompt"] == "a drawing of a red ring left of a small square"
    assert reworded["prompt"] == "a drawing of a ring in red to the left of a small square"
    assert plain | {"prompt": ""} == reworded | {"prompt": ""}


def test_objects_keep_their_distance_from_each_other_and_from_the_border():
    rng = np.random.default_rng(3)
    for _ in range(200):
        squares = [(shape.cx, shape.cy, shape.size) for shape in random_scene(rng).shapes]
        for index, one in enumerate(squares):
            reach = one[2] / 2 + MIN_BORDER - 1e-6
            assert reach <= min(one[:2]) and max(one[:2]) <= IMAGE_SIZE - reach
            assert all(boxes_apart(one, other, MIN_GAP - 1e-6) for other in squares[index + 1 :])
