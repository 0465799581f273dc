"""Scoring groups: batched once, split exactly, and no failure ever becomes a number."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from stage_ray.records import Prompt, RolloutGroup
from stage_ray.rewards import merge_scores, score_groups
from stage_ray.rewards.base import RewardOutput


def group(group_id: int, images: int) -> RolloutGroup:
    """A group whose first pixels number its images: 10 * group_id + image."""
    pixels = np.zeros((images, 4, 4, 3), np.uint8)
    pixels[:, 0, 0, 0] = 10 * group_id + np.arange(images)
    none = np.zeros((images, 2), np.float32)
    prompt, seeds = Prompt(group_id, f"prompt {group_id}"), tuple(range(images))
    return RolloutGroup(group_id, prompt, seeds, none.astype(np.int32), none, none, none, none, pixels, 0, "w", 0.0)


class Scorer:
    """Calls a function on (images, prompts) and counts its calls."""

    def __init__(self, answer: Callable) -> None:
        self.answer, self.calls = answer, 0

    def score(self, images, prompts):
        self.calls += 1
        return self.answer(images, prompts)


def number(images, prompts) -> RewardOutput:
    """The image's number, which must belong to its prompt."""
    scores = images[:, 0, 0, 0].astype(np.float32)
    details = tuple({"text": prompt.text} for prompt in prompts)
    return RewardOutput(scores, np.ones(len(images), bool), details)


def test_all_images_of_all_groups_go_through_one_call_and_come_back_to_their_group():
    scorer = Scorer(number)
    first, second = score_groups([("number", scorer)], [group(3, 2), group(5, 3)])
    assert scorer.calls == 1
    assert (first.group_id, first.scores.tolist()) == (3, [[30.0], [31.0]])
    assert (second.group_id, second.scores.tolist()) == (5, [[50.0], [51.0], [52.0]])
    assert second.details[2] == {"number": {"text": "prompt 5"}}
    assert first.valid.all() and first.names == ("number",) and first.score_s >= 0


def test_scorers_are_columns_in_the_order_of_the_config():
    twice = Scorer(lambda i, p: RewardOutput(2 * number(i, p).scores, np.ones(len(i), bool), ({},) * len(i)))
    (scored,) = score_groups([("one", Scorer(number)), ("two", twice)], [group(1, 2)])
    assert scored.names == ("one", "two") and scored.scores.tolist() == [[10.0, 20.0], [11.0, 22.0]]


def test_a_scorer_that_raises_spoils_its_own_column_only_and_says_why(caplog: pytest.LogCaptureFixture):
    def broken(images, prompts):
        raise OSError("the service is down")

    with caplog.at_level(logging.ERROR):
        (scored,) = score_groups([("good", Scorer(number)), ("bad", Scorer(broken))], [group(1, 2)])
    assert scored.valid.tolist() == [[True, False], [True, False]]
    assert np.isnan(scored.scores[:, 1]).all() and scored.scores[:, 0].tolist() == [10.0, 11.0]
    assert scored.details[0]["bad"] == {"error": "OSError: the service is down"}
    assert caplog.records[0].exc_info is not None  # the traceback is in the log


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_invalid_whatever_the_scorer_claims(value: float):
    def odd(images, prompts):
        output = number(images, prompts)
        output.scores[1] = value
        return output

    (scored,) = score_groups([("odd", Scorer(odd))], [group(1, 3)])
    assert scored.valid[:, 0].tolist() == [True, False, True]
    assert np.isnan(scored.scores[1, 0]) and "the score is" in scored.details[1]["odd"]["error"]


def test_a_score_that_the_scorer_calls_invalid_never_becomes_a_number():
    def unsure(images, prompts):
        return RewardOutput(np.zeros(len(images), np.float32), np.zeros(len(images), bool), ({},) * len(images))

    (scored,) = score_groups([("unsure", Scorer(unsure))], [group(1, 2)])
    assert np.isnan(scored.scores).all() and scored.details[0]["unsure"]["error"] == "the scorer calls it invalid"


@pytest.mark.parametrize(
    "answer",
    [
        lambda i, p: RewardOutput(np.zeros(1, np.float32), np.ones(1, bool), ({},)),
        lambda i, p: RewardOutput(np.zeros(len(i), np.float32), np.ones(len(i), bool), ()),
        lambda i, p: RewardOutput(np.zeros((len(i), 1), np.float32), np.ones(len(i), bool), ({},) * len(i)),
        lambda i, p: [0.0] * len(i),
        lambda i, p: None,
    ],
)
def test_an_answer_of_the_wrong_form_is_no_answer(answer: Callable):
    scored = score_groups([("short", Scorer(answer))], [group(1, 2), group(2, 2)])
    for one in scored:
        assert not one.valid.any() and np.isnan(one.scores).all() and one.details[0]["short"]["error"]


def test_features_travel_with_the_scores_of_their_group():
    def seen(images, prompts):
        output = number(images, prompts)
        return replace(output, features=np.stack([output.scores, -output.scores], axis=1))

    first, second = score_groups([("plain", Scorer(number)), ("seen", Scorer(seen))], [group(3, 2), group(5, 3)])
    assert first.features.keys() == second.features.keys() == {"seen"}
    assert second.features["seen"].tolist() == [[50.0, -50.0], [51.0, -51.0], [52.0, -52.0]]
    assert second.features["seen"].dtype == np.float32


def test_an_image_whose_features_are_not_finite_has_no_score_and_features_of_another_number_are_no_answer():
    def seen(images, prompts, features):
        return replace(number(images, prompts), features=features)

    odd = np.array([[1.0, np.nan], [1.0, 2.0]])
    (scored,) = score_groups([("seen", Scorer(lambda i, p: seen(i, p, odd)))], [group(1, 2)])
    assert scored.valid[:, 0].tolist() == [False, True]
    assert scored.details[0]["seen"]["error"] == "its features are not finite"
    (scored,) = score_groups([("seen", Scorer(lambda i, p: seen(i, p, np.ones((3, 2)))))], [group(1, 2)])
    assert not scored.valid.any() and "features [3, 2]" in scored.details[0]["seen"]["error"]


def test_no_groups_no_calls():
    scorer = Scorer(number)
    assert score_groups([("number", scorer)], []) == [] and scorer.calls == 0


class Rank:
    """Compares the images of a group: 1 for the brightest, 0 for the others."""

    def score_groups(self, groups):
        scores = np.concatenate([group.images[:, 0, 0, 0] == group.images[:, 0, 0, 0].max() for group in groups])
        return RewardOutput(scores.astype(np.float32), np.ones(len(scores), bool), ({},) * len(scores))


def test_a_scorer_may_see_whole_groups():
    first, second = score_groups([("rank", Rank()), ("number", Scorer(number))], [group(1, 2), group(2, 3)])
    assert first.scores.tolist() == [[0.0, 10.0], [1.0, 11.0]]
    assert second.scores[:, 0].tolist() == [0.0, 0.0, 1.0]


def test_a_scorer_that_sees_groups_and_raises_spoils_its_own_column_only():
    class Broken:
        def score_groups(self, groups):
            raise OSError("the service is down")

    (scored,) = score_groups([("bad", Broken()), ("number", Scorer(number))], [group(1, 2)])
    assert scored.valid.tolist() == [[False, True], [False, True]]
    assert scored.details[0]["bad"] == {"error": "OSError: the service is down"}


def test_without_scorers_groups_have_no_columns():
    (scored,) = score_groups([], [group(1, 2)])
    assert scored.scores.shape == (2, 0) and scored.details == ({}, {})


def test_scores_of_several_pools_are_put_together_as_one_pool_would_have_given_them():
    def seen(images, prompts):
        return replace(number(images, prompts), features=np.ones((len(images), 2)))

    scorers = [("one", Scorer(number)), ("two", Scorer(seen)), ("three", Scorer(number))]
    (whole,) = score_groups(scorers, [group(1, 2)])
    parts = [score_groups(some, [group(1, 2)])[0] for some in (scorers[::2], scorers[1:2])]
    merged = merge_scores(parts, ["one", "two", "three"])
    assert merged.names == whole.names and [*merged.details[0]] == [*whole.names] and merged.details == whole.details
    np.testing.assert_array_equal(merged.scores, whole.scores)
    np.testing.assert_array_equal(merged.valid, whole.valid)
    assert merged.features.keys() == {"two"} and merged.score_s == sum(part.score_s for part in parts)
    assert merge_scores(parts[:1], ["one", "three"]) is parts[0]
