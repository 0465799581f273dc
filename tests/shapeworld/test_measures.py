"""ShapeWorld's measures see what they are there to see: pictures that fall apart, and ones that are all alike."""

from __future__ import annotations

import numpy as np
import pytest

from stage_ray.config import MeasureConfig
from stage_ray.evaluation.measures.base import measured, resolve_measures
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.records import Prompt, RolloutGroup, ScoredGroup
from stage_ray.rewards import build_rewards, score_groups
from stage_ray.rewards.vectors import VectorsReward
from stage_ray.shapeworld.clean import SPECK, CleanReward, largest_blot
from stage_ray.shapeworld.reference import draw_prompt
from stage_ray.shapeworld.scene import Scene, Shape, random_scene, render

PROMPTS = load_prompts("package:stage_ray/shapeworld/assets/prompts/heldout.jsonl")[::2]


def group_of(prompt: Prompt, images: list[np.ndarray]) -> RolloutGroup:
    none, count = np.zeros((len(images), 1), np.float32), len(images)
    return RolloutGroup(prompt.index, prompt, tuple(range(count)), *[none] * 5, np.stack(images), 0, "", 0.0)


def scored(draw: object, per_prompt: int = 4) -> list[ScoredGroup]:
    """What the measure's scorer says of pictures that ``draw`` makes of a prompt and a number."""
    (config,) = resolve_measures([MeasureConfig(measure="shapeworld")])
    groups = [group_of(prompt, [draw(prompt, i) for i in range(per_prompt)]) for prompt in PROMPTS]  # type: ignore[operator]
    return score_groups(build_rewards([config.reward]), groups)


def test_equal_seeds_draw_equal_pictures_of_every_held_out_prompt():
    for prompt in PROMPTS:
        np.testing.assert_array_equal(draw_prompt(prompt, 3), draw_prompt(prompt, 3))
    assert (draw_prompt(PROMPTS[0], 3) != draw_prompt(PROMPTS[0], 4)).any()
    (config,) = resolve_measures([MeasureConfig(measure="shapeworld")])
    unlike = [p.text for p, _ in VectorsReward.check([PROMPTS[0], Prompt(1, "a dog")], **config.options)]
    assert unlike == ["a dog"], "only ShapeWorld's records say what to draw"


def test_real_pictures_are_near_smeared_ones_far_and_one_picture_for_all_is_without_diversity():
    def smeared(prompt: Prompt, number: int) -> np.ndarray:
        first, second = (draw_prompt(prompt, 1000 + 2 * number + i).astype(np.float32) for i in range(2))
        return ((first + second) / 2).astype(np.uint8)

    config = [MeasureConfig(measure="shapeworld")]
    found = {
        name: measured(config, PROMPTS, scored(draw))
        for name, draw in {
            "real": lambda prompt, number: draw_prompt(prompt, 1000 + number),
            "smeared": smeared,
            "alike": lambda prompt, number: draw_prompt(PROMPTS[0], 1000),
        }.items()
    }
    name = "Frechet distance"
    for kind in ("smeared", "alike"):
        apart = found[kind][name].value - found["real"][name].value
        assert apart > 3 * np.hypot(found[kind][name].error, found["real"][name].error), kind
    assert found["real"]["precision"].value > 0.6 > found["smeared"]["precision"].value
    assert found["real"]["recall"].value > 0.6 > found["alike"]["recall"].value
    assert found["alike"]["diversity"].value == pytest.approx(0, abs=1e-5)


def test_a_picture_is_clean_where_every_blot_is_an_object():
    noise = np.random.default_rng(0)
    scenes = [render(random_scene(noise)) for _ in range(20)]
    empty = render(Scene(()))
    blotted = render(Scene((Shape("ring", "red", 20.0, 20.0, 24.0),)))
    blotted[46:56, 44:58] = noise.integers(0, 190, (10, 14, 3))
    output = CleanReward().score(np.stack([*scenes, empty, blotted]), [])
    assert output.scores[:20].mean() >= 0.95 and output.scores[20] == 0
    assert output.scores[21] == 0 and output.details[21]["blot"] > SPECK
    assert largest_blot(blotted, [np.ones((64, 64), bool)]) == 0
