"""The OCR reward, with the real PP-OCR models of rapidocr's wheel, on pictures of text drawn by Pillow."""

import json
import sys
from functools import cache

import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.records import Prompt
from stage_ray.rewards import build_rewards, check_rewards
from stage_ray.rewards.ocr import similarity, target_of

OCR = RewardConfig(type="ocr")


def page(*lines: str) -> np.ndarray:
    """A white picture, uint8 [384, 384, 3], with black lines of text."""
    picture = Image.new("RGB", (384, 384), "white")
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 44)
    for row, line in enumerate(lines):
        ImageDraw.Draw(picture).text((30, 60 + 90 * row), line, fill="black", font=font)
    return np.asarray(picture)


@cache
def scorer():
    return build_rewards([OCR])[0][1]


def test_right_text_is_1_wrong_text_less_and_missing_text_0():
    prompt = Prompt(0, 'a page that says "Hello World", in black')
    pictures = np.stack([page("Hello World"), page("Hello", "World"), page("Help Wanted"), page()])
    output = scorer().score(pictures, [prompt] * 4)
    assert output.valid.all()
    assert output.scores[0] == output.scores[1] == 1
    assert 0 < output.scores[2] < 0.8 and output.scores[3] == 0
    assert [said["verdict"] for said in output.details] == [True, True, False, False]
    assert output.details[2] == {"target": "Hello World", "read": "Help Wanted", "verdict": False}


def test_colours_arrive_as_they_are():
    picture = page("Open")
    red = np.where(picture == 0, np.uint8([220, 30, 30]), np.uint8([250, 250, 255])).astype(np.uint8)
    assert scorer().score(red[None], [Prompt(0, 'a sign "open"')]).scores[0] == 1


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("Step Goal Achieved", "Step Goal Achieved", 1.0),
        ("xx stepgoal achieved yy", "Step Goal Achieved", 1.0),  # part of it, whatever the spaces
        ("abce", "abcd", 0.75),
        ("abcdefgh", "xyz", 0.0),  # never below 0: three of three at the most
        ("", "a", 0.0),
    ],
)
def test_the_score_is_the_published_formula(read, target, score):
    assert similarity(read, target) == pytest.approx(score)


def test_targets_of_the_published_lists(tmp_path):
    text = 'A smartwatch, displaying "Step Goal Achieved" and "9:41"'
    assert target_of(Prompt(0, text)) == "Step Goal Achieved"
    assert target_of(Prompt(0, "a shop called “Chez Nous”")) == "Chez Nous"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a neon sign", "target": "BAR"}))
    assert target_of(load_prompts(str(tmp_path / "p.jsonl"))[0]) == "BAR"


def test_prompts_without_a_target_are_told_before_the_start_and_get_no_score():
    prompts = [Prompt(0, 'a sign "Open"'), Prompt(1, "a cat"), Prompt(2, 'a sign " "')]
    assert [prompt.index for prompt, why in check_rewards([OCR], prompts) if "put it in double quotes" in why] == [1, 2]
    output = scorer().score(np.stack([page("Open")] * 3), prompts)
    assert output.valid.tolist() == [True, False, False] and "names no text" in output.details[1]["error"]


def test_a_missing_package_is_named_before_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ConfigError, match=r"rewards.0.options of ocr: .*pip install 'stage-ray\[ocr\]'"):
        check_rewards([OCR], [])
