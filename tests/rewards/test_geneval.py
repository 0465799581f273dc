"""The GenEval reward over a detector whose answers are known."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pytest

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.records import Prompt
from stage_ray.rewards import build_rewards, check_rewards
from stage_ray.rewards.base import Reward
from stage_ray.rewards.detection import Detection
from stage_ray.rewards.geneval import GenEvalReward

THREE = {"tag": "counting", "include": [{"class": "ring", "count": 3}], "exclude": [{"class": "ring", "count": 4}]}


class Rings:
    """Sees as many rings as the first pixel says, each a little less sure than the last: 0.95, 0.85, ..."""

    def detect(self, images: np.ndarray) -> list[list[Detection]]:
        return [
            [
                Detection("ring", 0.95 - 0.1 * n, (20.0 * n, 0, 20.0 * n + 10, 10), "red", 1.0)
                for n in range(image[0, 0, 0])
            ]
            for image in images
        ]


class Painter(Rings):
    """Sees what `Rings` sees, in a color of its own; knows no other."""

    def __init__(self, color: str, dots: int = 1) -> None:
        self.colors = (color,)

    @classmethod
    def check(cls, color: str, **others: int) -> None:
        if color == "infrared":
            raise ConfigError("color 'infrared' cannot be seen")


class NoDetector:
    """Has no method `detect`."""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch):
    """Configs name detectors by dotted path; give this file one whatever way pytest imported it."""
    monkeypatch.setitem(sys.modules, "known_detectors", sys.modules[__name__])


def geneval(**options) -> Reward:
    config = RewardConfig(type="geneval", options={"detector": "known_detectors.Rings", **options})
    return build_rewards([config])[0][1]


def pictures(*rings: int) -> np.ndarray:
    images = np.zeros((len(rings), 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = rings
    return images


def prompts(record: dict, count: int) -> Sequence[Prompt]:
    return [Prompt(0, "some rings", record)] * count


def test_scores_are_soft_by_default_and_the_strict_verdict_is_in_the_details():
    output = geneval(counting_threshold=0.3).score(pictures(3, 2), prompts(THREE, 2))
    np.testing.assert_allclose(output.scores, [1.0, 2 / 3], rtol=1e-6)
    assert output.valid.all()
    assert output.details[0] == {"verdict": True, "soft": 1.0, "tag": "counting", "reason": ""}
    assert output.details[1]["verdict"] is False and output.details[1]["reason"] == "expected ring>=3, found 2"


def test_the_strict_score_is_zero_or_one():
    output = geneval(score="strict", counting_threshold=0.3).score(pictures(3, 2), prompts(THREE, 2))
    assert output.scores.tolist() == [1.0, 0.0]


def test_counting_prompts_use_the_higher_threshold():
    # Of three rings at 0.95, 0.85 and 0.75 only one is above GenEval's 0.9 for counting, and all are above its 0.3.
    assert geneval().score(pictures(3), prompts(THREE, 1)).details[0]["reason"] == "expected ring>=3, found 1"
    untagged = {**THREE, "tag": "two_object"}
    assert geneval().score(pictures(3), prompts(untagged, 1)).details[0]["verdict"] is True


def test_a_class_is_cut_to_its_most_confident_detections():
    output = geneval(counting_threshold=0.1, max_per_class=3).score(pictures(5), prompts(THREE, 1))
    assert output.details[0]["verdict"] is True


def test_the_published_score_can_be_chosen():
    behind = {"class": "ring", "count": 1, "position": ["left of", 0]}
    record = {"include": [{"class": "ring", "count": 1}, behind]}  # a ring is not left of itself
    scores = {
        s: float(geneval(score=s).score(pictures(1), prompts(record, 1)).scores[0]) for s in ("soft", "soft_published")
    }
    assert scores == {"soft": pytest.approx(2 / 3), "soft_published": pytest.approx(3 / 4)}


@pytest.mark.parametrize("record", [{}, {"include": []}, {"include": None}])
def test_a_prompt_without_include_is_invalid_and_says_so(record: dict):
    output = geneval().score(pictures(1, 1), [Prompt(0, "hello", record), Prompt(1, "three rings", THREE)])
    assert output.valid.tolist() == [False, True] and np.isnan(output.scores[0])
    assert "prompt 'hello' has no \"include\"" in output.details[0]["error"]


def test_a_malformed_record_is_invalid_and_says_where():
    output = geneval().score(pictures(1), prompts({"include": [{"class": "ring", "count": "x"}]}, 1))
    assert not output.valid[0] and "include[0]: count 'x'" in output.details[0]["error"]


def test_a_prompt_for_what_the_detector_never_sees_is_no_failure_of_the_model():
    reward = GenEvalReward("stage_ray.shapeworld.detector.ShapeDetector")
    asked = [
        Prompt(0, "a kettle", {"include": [{"class": "kettle"}]}),
        Prompt(1, "a mauve ring", {"include": [{"class": "ring", "color": "mauve"}]}),
        Prompt(2, "a ring", {"include": [{"class": "ring"}]}),
    ]
    output = reward.score(np.zeros((3, 64, 64, 3), np.uint8), asked)
    assert output.valid.tolist() == [False, False, True]
    assert "asks in include[0] for class 'kettle', unknown here" in output.details[0]["error"]
    assert "for color 'mauve'" in output.details[1]["error"]
    refused = list(GenEvalReward.check(asked, detector="stage_ray.shapeworld.detector.ShapeDetector"))
    assert [prompt.index for prompt, _ in refused] == [0, 1]


def test_what_is_no_detector_is_refused():
    with pytest.raises(ConfigError, match="detect"):
        geneval(detector="known_detectors.NoDetector")
    with pytest.raises(ConfigError, match="no module named"):
        geneval(detector="nowhere.Detector")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "detector_options.color is missing"),
        ({"color": "red", "colour": "red"}, "detector_options.colour is no option .*did you mean 'color'"),
        ({"color": "red", "dots": "many"}, "detector_options.dots = 'many'"),
        ({"color": "infrared"}, "'infrared' cannot be seen"),
    ],
)
def test_a_detectors_options_are_checked_before_it_is_built(options: dict, complaint: str):
    assert geneval(detector="known_detectors.Painter", detector_options={"color": "red"}) is not None
    with pytest.raises(ConfigError, match=f"rewards.0.options of geneval: .*{complaint}"):
        rewards = {"detector": "known_detectors.Painter", "detector_options": options}
        check_rewards([RewardConfig(type="geneval", options=rewards)], [])
