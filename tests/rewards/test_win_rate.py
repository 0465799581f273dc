"""Win rates within a group, against a loop over its pairs; over scorers and judges, and over what they cannot say."""

from __future__ import annotations

import numpy as np
import pytest

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.records import Prompt
from stage_ray.rewards import build_rewards, check_rewards, score_groups
from stage_ray.rewards.base import RewardOutput
from tests.rewards.test_scoring import group

HERE = "tests.rewards.test_win_rate"


class First:
    """The first pixel, and none where that is 13; it cannot judge a prompt with the word ``refuses``."""

    def __init__(self, refuses: str = "nothing") -> None:
        pass

    @classmethod
    def check(cls, prompts, refuses="nothing"):
        return [(prompt, f"it has the word {refuses}") for prompt in prompts if refuses in prompt.text]

    def score(self, images, prompts):
        scores = images[:, 0, 0, 0].astype(np.float32)
        scores[scores == 13] = np.nan
        verdicts = tuple({"verdict": bool(score > 5)} for score in scores)
        return RewardOutput(scores, np.isfinite(scores), verdicts, np.stack([scores, scores], axis=1))


class Judge:
    """Prefers higher first pixels by their distance; has no answer where they differ by 2."""

    def compare(self, prompt, images_a, images_b):
        ahead = images_a[:, 0, 0, 0].astype(float) - images_b[:, 0, 0, 0]
        return [float("nan") if abs(by) == 2 else 0.5 + by / 20 for by in ahead]


class Loud(Judge):
    """Its numbers are none of the protocol."""

    def compare(self, prompt, images_a, images_b):
        return [2.0] * len(images_a)


def pictures(*values: int):
    one = group(1, len(values))
    one.images[:, 0, 0, 0] = values
    return one


def win_rate(scorer: str, **options):
    return build_rewards([RewardConfig(type="win_rate", options={"scorer": f"{HERE}.{scorer}", **options})])


def loop(beats, count: int) -> list[float]:
    return [sum(beats(i, j) for j in range(count) if j != i) / (count - 1) for i in range(count)]


@pytest.mark.parametrize("margin", [0, 2])
def test_an_image_scores_the_share_of_its_group_that_it_beats(margin: int):
    groups = [[3, 9, 4, 3, 7], [1, 2]]
    for scored, x in zip(
        score_groups(win_rate("First", margin=margin), [pictures(*x) for x in groups]), groups, strict=True
    ):
        expected = loop(lambda i, j, x=x: 0.5 if abs(x[i] - x[j]) <= margin else float(x[i] > x[j]), len(x))
        assert scored.scores[:, 0] == pytest.approx(expected) and scored.valid.all()
        assert scored.details[1]["win_rate"] == {"verdict": x[1] > 5, "score": x[1]}
        assert scored.features["win_rate"].tolist() == [[value, value] for value in x]


def test_a_judge_is_asked_about_pairs_and_an_answer_that_cannot_be_read_is_a_tie():
    x = [3, 9, 5, 4]
    (scored,) = score_groups(win_rate("Judge"), [pictures(*x)])
    expected = loop(lambda i, j: 0.5 if abs(x[i] - x[j]) == 2 else 0.5 + (x[i] - x[j]) / 20, len(x))
    assert scored.scores[:, 0] == pytest.approx(expected) and scored.valid.all()
    (scored,) = score_groups(win_rate("Judge"), [pictures(3, 5)])
    assert not scored.valid.any(), "nothing was said of either"


def test_an_image_without_a_score_has_no_win_rate_and_says_why():
    (scored,) = score_groups(win_rate("First"), [pictures(3, 13, 4)])
    assert scored.valid[:, 0].tolist() == [True, False, True]
    assert scored.details[1]["win_rate"]["error"] == "the score is nan"


def test_a_judge_that_breaks_its_protocol_gives_no_score():
    (scored,) = score_groups(win_rate("Loud"), [pictures(3, 5)])
    assert not scored.valid.any() and "not 1 numbers in 0..1" in scored.details[0]["win_rate"]["error"]


def test_the_inner_scorer_checks_prompts_before_a_run():
    config = RewardConfig(type="win_rate", options={"scorer": f"{HERE}.First", "options": {"refuses": "ring"}})
    prompts = [Prompt(0, "a cube"), Prompt(1, "a ring")]
    assert check_rewards([config], prompts) == [(prompts[1], "win_rate: it has the word ring")]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"scorer": "genevall"}, "rewards.0.options of win_rate: scorer.type = 'genevall'.*did you mean 'geneval'"),
        ({"scorer": f"{HERE}.pictures"}, r"with a method score.* or compare\(prompt, images_a, images_b\)"),
        ({"scorer": f"{HERE}.First", "options": {"x": 1}}, "scorer.options.x is no option.*allowed: refuses"),
    ],
)
def test_a_mistake_inside_is_refused_before_a_run(options: dict, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        check_rewards([RewardConfig(type="win_rate", options=options)], [])


def test_a_margin_is_of_scores():
    with pytest.raises(ConfigError, match=r"margin = 0.1 is of scores.*leave it out"):
        win_rate("Judge", margin=0.1)
