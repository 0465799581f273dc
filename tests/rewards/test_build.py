"""Scorers from a config: names, dotted paths, options; every mistake is one sentence that names its fix."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pytest

from stage_ray.config import RewardConfig
from stage_ray.config.inputs import files_of, hub_inputs
from stage_ray.config.load import load_config
from stage_ray.errors import ConfigError
from stage_ray.evaluation.suites import resolve_suites
from stage_ray.records import Prompt
from stage_ray.rewards import build_rewards
from stage_ray.rewards.base import RewardOutput


class Constant:
    """Says the same of everything."""

    def __init__(self, value: float, name: str = "x") -> None:
        if value > 100:
            raise ConfigError("value is too large; use at most 100")
        self.value = value

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        count = len(images)
        return RewardOutput(np.full(count, self.value, np.float32), np.ones(count, bool), ({},) * count)


class Mute:
    """No scorer."""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "my_scorers", sys.modules[__name__])


def build(type_: str, name: str | None = None, **options):
    return build_rewards([RewardConfig(type=type_, name=name, options=options)])[0]


def test_a_dotted_path_builds_a_users_own_scorer_with_its_options():
    column, scorer = build("my_scorers.Constant", value=0.5)
    assert column == "Constant" and scorer.value == 0.5
    assert build("my_scorers.Constant", name="mine", value=1)[0] == "mine"


def test_a_number_that_yaml_reads_as_text_reaches_the_scorer_as_a_number():
    assert build("my_scorers.Constant", value="1e-3")[1].value == 0.001


@pytest.mark.parametrize(
    ("type_", "options", "complaint"),
    [
        ("genevall", {}, "did you mean 'geneval'"),
        ("whatever", {}, "known here: aesthetic, binding, clip, "),
        ("nowhere.Scorer", {}, "no module named"),
        ("my_scorers.Nothing", {}, "has no 'Nothing'"),
        ("my_scorers.Mute", {}, "method score"),
        ("my_scorers.Constant", {}, "rewards.0.options.value is missing"),
        (
            "my_scorers.Constant",
            {"value": 1, "valeu": 2},
            "valeu is no option.*did you mean 'value'.*allowed: value, name",
        ),
        ("my_scorers.Constant", {"value": "high"}, "rewards.0.options.value = 'high'"),
        ("my_scorers.Constant", {"value": 101}, "rewards.0.options of my_scorers.Constant: value is too large"),
        ("geneval", {"detector": "x.Y", "threshold": 1.5}, "threshold = 1.5: .*less than or equal to 1"),
        ("geneval", {"detector": "x.Y", "score": "softt"}, "score = 'softt'"),
        ("clip", {"path": "/does/not/exist"}, "does not exist"),
        ("vlm_judge", {"model": "m", "at_onec": 2}, "at_onec is no option.*did you mean 'at_once'"),
        ("vlm_judge", {"model": "m", "at_once": 0}, "at_once = 0: .*greater than or equal to 1"),
    ],
)
def test_a_mistake_is_refused_in_one_sentence(type_: str, options: dict, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        build(type_, **options)


def test_models_that_scorers_load_by_default_are_written_out_so_that_fetch_and_pin_see_them():
    rewards = [
        "rewards=[{type: geneval}, {type: win_rate, options: {scorer: pickscore, options: {processor: null}}}, "
        "{type: hps, options: {path: ./my.pt}}, {type: ocr}, {type: tests.scorers.Brightness}]"
    ]
    run = resolve_suites(load_config("stage_shapeworld", rewards))
    found = {key: uri.to_uri().removeprefix("hf://models/") for key, uri in hub_inputs(run).items()}
    assert found == {
        "rewards.0.options.detector_options.path": "facebook/mask2former-swin-small-coco-instance",
        "rewards.0.options.detector_options.clip": "openai/clip-vit-large-patch14",
        "rewards.1.options.options.path": "yuvalkirstain/PickScore_v1",
        "rewards.2.options.processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    }
    assert "*.safetensors" not in files_of("rewards.2.options.processor")
    assert [reward.options for reward in run.rewards[3:]] == [{}, {}]
