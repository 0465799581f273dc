"""The binding scorer over ShapeWorld's detector: what is asked is right, and each thing changed is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stage_ray.errors import ConfigError
from stage_ray.evaluation.binding import BindingBenchmark
from stage_ray.records import Prompt
from stage_ray.rewards.binding import BindingReward
from stage_ray.shapeworld.grammar import binding_prompts, item, make_record, sample_scene
from stage_ray.shapeworld.scene import Scene, Shape, render

(JUDGE,) = BindingBenchmark.rewards
ITEMS = [item("ring", size="large"), item("cross", 1, "blue", size="small")]
RECORD = make_record("mixture", ITEMS, background="mint")
RING, CROSS = Shape("ring", "red", 16.0, 16.0, 26.0), Shape("cross", "blue", 46.0, 46.0, 18.0)
RIGHT = Scene((RING, CROSS), "mint")


@pytest.fixture(scope="module")
def scorer() -> BindingReward:
    return BindingReward(**JUDGE.options)


def test_pictures_of_the_benchmarks_prompts_are_right(scorer: BindingReward):
    rng = np.random.default_rng(0)
    prompts = [Prompt(i, record["prompt"], record) for i, record in enumerate(binding_prompts())]
    assert list(BindingReward.check(prompts, **JUDGE.options)) == []
    output = scorer.score(np.stack([render(sample_scene(prompt.record, rng)) for prompt in prompts]), prompts)
    assert output.valid.all() and output.scores.mean() >= 0.98
    assert BindingBenchmark().values(prompts[0], {}, {"binding": output.details[0]}) == {"three_objects": 1.0}


@pytest.mark.parametrize(
    ("scene", "reason"),
    [
        (RIGHT, ""),
        (replace(RIGHT, background="sky"), "expected mint paper, found sky"),
        (replace(RIGHT, shapes=(RING, replace(CROSS, color="green"))), "expected blue cross>=1, found green"),
        (replace(RIGHT, shapes=(replace(RING, size=18.0), CROSS)), "expected 18 pixels well above 18"),
        (replace(RIGHT, shapes=(RING, CROSS, Shape("square", "red", 16.0, 48.0, 16.0))), "expected 2 objects, found 3"),
        (replace(RIGHT, shapes=(RING,)), "expected cross>=1, found 0; expected 2 objects, found 1"),
    ],
)
def test_each_thing_that_differs_is_a_fault(scorer: BindingReward, scene: Scene, reason: str):
    (detail,) = scorer.score(render(scene)[None], [Prompt(0, RECORD["prompt"], RECORD)]).details
    assert detail == {"verdict": not reason, "tag": "mixture", "reason": reason}


def test_a_record_that_cannot_be_judged_is_no_failure_of_the_picture(scorer: BindingReward):
    output = scorer.score(render(RIGHT)[None], [Prompt(0, "a photo", {})])
    assert not output.valid[0] and "error" in output.details[0]


def test_a_detector_that_names_no_backgrounds_is_refused_before_a_run():
    with pytest.raises(ConfigError, match="no method backgrounds"):
        list(BindingReward.check([], detector="stage_ray.rewards.mask2former.Mask2FormerDetector"))
