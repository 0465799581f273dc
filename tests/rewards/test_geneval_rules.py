"""GenEval's rules on hand-made detections: each rule, and the one error of the published soft score."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from stage_ray.rewards.detection import Detection
from stage_ray.rewards.geneval_rules import (
    Objects,
    Requirement,
    relations,
    requirements,
    soft_score,
    strict_verdict,
    task_of,
)


def thing(
    label: str, x: float = 10.0, y: float = 10.0, color: str | None = "red", confidence: float = 0.95
) -> Detection:
    """A 10 x 10 box centred on (x, y)."""
    return Detection(label, confidence, (x - 5, y - 5, x + 5, y + 5), color, 1.0)


def seen(things: Sequence[Detection]) -> Objects:
    objects: dict[str, list[Detection]] = {}
    for one in things:
        objects.setdefault(one.label, []).append(one)
    return objects


def verdict(record: dict, *things: Detection) -> tuple[bool, str]:
    return strict_verdict(requirements(record), requirements(record, "exclude"), seen(things))


def soft(record: dict, *things: Detection, published: bool = False) -> float:
    return soft_score(requirements(record), seen(things), published=published)


RING = {"include": [{"class": "ring", "count": 1}]}
THREE = {"include": [{"class": "ring", "count": 3}], "exclude": [{"class": "ring", "count": 4}]}
BLUE_RING = {"include": [{"class": "ring", "count": 1, "color": "blue"}]}
RING_LEFT_OF_CROSS = {
    "include": [{"class": "cross", "count": 1}, {"class": "ring", "count": 1, "position": ["left of", 0]}]
}
LEFT, RIGHT = thing("ring", x=10), thing("cross", x=50)


def test_include_asks_for_at_least_the_count():
    assert verdict(RING) == (False, "expected ring>=1, found 0")
    assert verdict(RING, thing("ring"))[0]
    assert verdict(RING, thing("ring"), thing("ring", x=40))[0]


def test_exclude_turns_a_count_into_an_exact_count():
    assert not verdict(THREE, *[thing("ring")] * 2)[0]
    assert verdict(THREE, *[thing("ring")] * 3)[0]
    assert verdict(THREE, *[thing("ring")] * 4) == (False, "expected ring<4, found 4")


def test_every_counted_object_must_have_the_color():
    assert verdict(BLUE_RING, thing("ring", color="blue"))[0]
    assert verdict(BLUE_RING, thing("ring", color="red")) == (False, "expected blue ring>=1, found red")
    assert not verdict(BLUE_RING, thing("ring", color=None))[0]


def test_only_the_most_confident_objects_are_looked_at_for_color():
    assert not verdict(BLUE_RING, thing("ring", color="red"), thing("ring", x=40, color="blue", confidence=0.5))[0]


def test_position_is_judged_from_the_target_clause():
    assert verdict(RING_LEFT_OF_CROSS, LEFT, RIGHT)[0]
    swapped = verdict(RING_LEFT_OF_CROSS, thing("ring", x=50), thing("cross", x=10))
    assert swapped == (False, "expected ring left of target")


def test_a_position_without_its_target_fails():
    correct, reason = verdict(RING_LEFT_OF_CROSS, LEFT)
    assert not correct and "no target for ring to be left of" in reason


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (10, 40, {"left of"}),
        (70, 40, {"right of"}),
        (40, 10, {"above"}),
        (40, 70, {"below"}),
        (10, 10, {"left of", "above"}),
        (41, 40, set()),  # closer than a tenth of both sides
        (50, 40, {"right of"}),
        (43.9, 40, set()),  # (3.9 - 2) / 3.9 is below one half
        (44.1, 40, {"right of"}),
    ],
)
def test_relations_follow_genevals_margins(x: float, y: float, expected: set[str]):
    assert relations(thing("ring", x=x, y=y), thing("cross", x=40, y=40)) == expected


def test_none_filled_and_stringified_records_are_read_as_they_were_meant():
    record = {"include": [{"class": "ring", "count": "1", "color": None, "position": None}], "exclude": None}
    (need,) = requirements(record)
    assert (need.count, need.color, need.relation) == (1, None, None)
    assert requirements(record, "exclude") == []
    assert verdict(record, thing("ring"))[0] and soft(record, thing("ring")) == 1.0


@pytest.mark.parametrize("nothing", [None, float("nan"), "", " ", "None", "nan", "null"])
def test_what_tables_write_for_nothing_is_nothing(nothing):
    clause = {"class": "ring", "count": nothing, "color": nothing, "position": nothing}
    assert requirements({"include": [clause]}) == [Requirement("ring", 1)]
    assert requirements({"include": [clause], "exclude": nothing}, "exclude") == []
    assert task_of({"tag": nothing}) is None


@pytest.mark.parametrize("include", ['[{"class": "ring", "count": 1}]', {"class": "ring", "count": 1}, 3])
def test_clauses_that_are_no_list_are_refused(include):
    with pytest.raises(ValueError, match='"include" is not a list'):
        requirements({"include": include})


def test_a_tag_is_one_text():
    with pytest.raises(ValueError, match="is not one text"):
        task_of({"tag": ["colors", "counting"]})


@pytest.mark.parametrize(
    ("clause", "complaint"),
    [
        ({"count": 1}, 'no "class"'),
        ({"class": ""}, 'no "class"'),
        ({"class": "ring", "count": 2.5}, "count 2.5 is not a whole number"),
        ({"class": "ring", "count": "2.0"}, "count '2.0' is not a whole number"),
        ({"class": "ring", "count": float("inf")}, "count inf is not a whole number"),
        ({"class": "ring", "count": True}, "count True is not a whole number"),
        ({"class": "ring", "count": [1]}, "is not a whole number"),
        ({"class": "ring", "color": ["red"]}, "color .* is not one text"),
        ({"class": "ring", "position": ["above", 0.5]}, "not like"),
        ({"class": "ring", "count": "many"}, "not a whole number"),
        ({"class": "ring", "count": 0}, "below 1"),
        ({"class": "ring", "count": 1, "position": ["near", 0]}, "not one of left of"),
        ({"class": "ring", "count": 1, "position": ["above", 0]}, "does not come before it"),
        ({"class": "ring", "count": 1, "position": "above"}, "not like"),
    ],
)
def test_a_malformed_clause_is_named(clause: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint) as caught:
        requirements({"include": [clause]})
    assert "include[0]" in str(caught.value)


def test_the_soft_score_counts_all_objects_and_falls_with_the_distance():
    assert soft(THREE, *[thing("ring")] * 3) == 1.0
    assert soft(THREE, *[thing("ring")] * 2) == pytest.approx(2 / 3)
    assert soft(THREE, *[thing("ring")] * 4) == pytest.approx(2 / 3)
    assert soft(RING, *[thing("ring")] * 3) == -1.0  # unclamped, as published


def test_the_soft_score_of_a_color_is_half_count_and_half_color():
    assert soft(BLUE_RING, thing("ring", color="blue")) == 1.0
    assert soft(BLUE_RING, thing("ring", color="red")) == 0.5
    assert soft(BLUE_RING) == 0.0  # count 0 and color 0


def test_the_published_soft_score_pays_for_a_wrong_position_and_the_mended_one_does_not():
    wrong = (thing("ring", x=50), thing("cross", x=10))
    assert soft(RING_LEFT_OF_CROSS, LEFT, RIGHT) == soft(RING_LEFT_OF_CROSS, LEFT, RIGHT, published=True) == 1.0
    assert soft(RING_LEFT_OF_CROSS, *wrong, published=True) == pytest.approx(3 / 4)  # 1, 1, 0 and the stray 1
    assert soft(RING_LEFT_OF_CROSS, *wrong) == pytest.approx(2 / 3)  # 1, 1, 0


def test_a_missing_target_costs_the_same_in_both_soft_scores():
    for published in (False, True):
        assert soft(RING_LEFT_OF_CROSS, LEFT, published=published) == pytest.approx(
            1 / 3
        )  # cross 0, ring 1, position 0


def test_a_position_is_not_judged_for_objects_of_the_wrong_color():
    ring = {"class": "ring", "count": 1, "color": "blue", "position": ["left of", 0]}
    record = {"include": [{"class": "cross", "count": 1}, ring]}
    assert soft(record, LEFT, RIGHT) == pytest.approx(2 / 3)  # 1, 1 and the color's 0
