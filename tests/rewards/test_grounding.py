"""GroundingDINO and GIT as rewards: their rules by hand, and small models of the published classes end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil, GitForCausalLM, GroundingDinoForObjectDetection, PreTrainedTokenizerFast
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.records import Prompt
from stage_ray.rewards import build_rewards, check_rewards
from stage_ray.rewards.grounding import SIDES, distinct, grounding_score, overlap
from tests.rewards.checkpoints import BERT_WORDS, save_git, save_grounding

LEFT, RIGHT, LOW = (np.array([box], float) for box in ((0, 0, 100, 100), (300, 10, 400, 110), (20, 300, 120, 400)))


@pytest.fixture(scope="module")
def grounding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_grounding(tmp_path_factory.mktemp("grounding"))


@pytest.fixture(scope="module")
def git(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_git(tmp_path_factory.mktemp("git"))


def spatial(locality: str) -> dict:
    info = {"obj1": "car", "obj2": "zebra", "locality": locality}
    return {"nouns": ["car", "zebra"], "task_type": "spatial", "spatial_info": info}


@pytest.mark.parametrize(
    ("locality", "first", "second", "score"),
    [
        ("left of", LEFT, RIGHT, 0.9),
        ("on the left of", RIGHT, LEFT, 0.4),
        ("right of", RIGHT, LEFT, 0.9),
        ("on the right of", LOW, LEFT, 0.4),  # it stands below, more than to the right
        ("above", LEFT, LOW, 0.9),
        ("on top of", LEFT, LOW, 0.9),
        ("on the top of", LOW, LEFT, 0.4),
        ("below", LOW, LEFT, 0.9),
        ("next to", LEFT, RIGHT, 0.9),  # 10 pixels apart in height
        ("near", LEFT, LEFT + 300, 0.4 + 0.5 * 150 / 300),
        ("left of", LEFT, LEFT + np.array([50, 0, 50, 0]), 0.4 + 0.5 * 0.1 / (1 / 3)),  # half of each is shared
        ("left of", LEFT, np.empty((0, 4)), 0.2),
        ("left of", np.empty((0, 4)), np.empty((0, 4)), 0.0),
    ],
)
def test_a_relation_is_worth_what_t2i_r1_says(locality, first, second, score):
    assert grounding_score(spatial(locality), {"car": first, "zebra": second}) == pytest.approx(score)


@pytest.mark.parametrize("locality", ["above", "on top of"])
def test_the_published_score_knows_no_above(locality):
    first, second = (np.array([[0.2, y, 0.1, 0.1]]) for y in (0.1, 0.8))  # cx, cy, w, h
    assert grounding_score(spatial(locality), {"car": first, "zebra": second}, published=True) == 0.4
    handled = grounding_score(spatial("on the top of"), {"car": first, "zebra": second}, published=True)
    assert handled == pytest.approx(0.9)
    far = np.array([[0.9, 0.9, 0.1, 0.1]])
    assert grounding_score(spatial("near"), {"car": first, "zebra": far}, published=True) == pytest.approx(0.9)


def test_numbers_count_what_is_left_after_suppression():
    boxes = np.concatenate([LEFT, LEFT + 5, RIGHT, LOW])  # the second is the first, seen twice
    assert len(distinct(boxes)) == 3 and overlap(LEFT[0], LEFT[0] + 5) > 0.5
    items = [{"obj_name": "cup", "num": 3}, {"obj_name": "car", "num": "2"}]
    record = {"nouns": ["cup", "car"], "task_type": "numeracy", "numeracy_info": items}
    assert grounding_score(record, {"cup": boxes, "car": LEFT}) == pytest.approx((1 + 0.2) / 2)
    assert grounding_score(record, {"cup": np.empty((0, 4)), "car": boxes[[0, 2]]}) == pytest.approx(0.5)
    centred = np.array([[0.5, 0.5, 0.4, 0.4], [0.51, 0.5, 0.4, 0.4]])  # one thing, twice
    one = {"nouns": ["cup"], "task_type": "numeracy", "numeracy_info": [{"obj_name": "cup", "num": 1}]}
    assert grounding_score(one, {"cup": centred}, published=True) == pytest.approx(0.2)


def test_other_tasks_score_the_share_of_nouns_that_are_there():
    record = {"nouns": ["cup", "car"], "task_type": "color", "spatial_info": None}
    assert grounding_score(record, {"cup": LEFT, "car": np.empty((0, 4))}) == 0.5


@torch.no_grad()
def test_a_small_grounding_dino_finds_what_its_probabilities_say(grounding):
    images = np.random.default_rng(0).integers(256, size=(3, 30, 40, 3), dtype=np.uint8)
    nouns = ["car", "stuffed teddy bear"]
    prompts = [
        Prompt(0, "a car", {"nouns": nouns, "task_type": "object"}),
        Prompt(1, "a zebra left of a cup", {"nouns": ["zebra", "cup"], "task_type": "numeracy",
                                            "numeracy_info": [{"obj_name": "cup", "num": 1}]}),
        Prompt(2, "something", {"nouns": []}),
    ]  # fmt: skip
    config = RewardConfig(type="grounding", options={"path": str(grounding), "threshold": 0.05, "device": "cpu"})
    assert check_rewards([config], prompts) == []
    scorer = build_rewards([config])[0][1]
    output = scorer.score(images, prompts)
    assert output.valid.all() and output.scores[2] == 1 and output.details[2] == {}

    tokenizer = PreTrainedTokenizerFast.from_pretrained(grounding)
    text = tokenizer(["car . stuffed teddy bear."], return_tensors="pt")
    pixels = GroundingDinoImageProcessorPil.from_pretrained(grounding)(list(images[:1]), return_tensors="pt")
    model = GroundingDinoForObjectDetection.from_pretrained(grounding).eval()
    probabilities = model(**pixels, **text).logits.sigmoid()[0]  # [queries, text]
    tokens = tokenizer.convert_ids_to_tokens(text["input_ids"][0])
    at = [tokens.index("car")], [tokens.index(word) for word in ("stuffed", "teddy", "bear")]
    counts = [int((probabilities[:, where].mean(1) > 0.05).sum()) for where in at]
    assert output.details[0] == dict(zip(nouns, counts, strict=True))
    assert output.scores[0] == sum(count > 0 for count in counts) / 2

    published = RewardConfig(type="grounding", options=config.options | {"threshold": 0.0, "published": True})
    said = build_rewards([published])[0][1].score(images[:1], prompts[:1])
    assert said.details[0]["stuffed teddy bear"] == 0 and said.scores[0] == 0.5


def test_records_that_cannot_be_judged_are_told_before_the_start(grounding):
    config = RewardConfig(type="grounding", options={"path": str(grounding)})
    records = [
        spatial("left of"),
        spatial("inside"),
        spatial("left of") | {"spatial_info": None},
        {"nouns": "car"},
        {"nouns": ["cup"], "task_type": "numeracy", "numeracy_info": [{"obj_name": "car", "num": 2}]},
        {"nouns": None},
    ]
    found = check_rewards([config], [Prompt(i, "x", record) for i, record in enumerate(records)])
    assert [prompt.index for prompt, _ in found] == [1, 2, 3, 4]
    assert "asks for locality 'inside'" in found[0][1] and "no list of texts" in found[2][1]
    assert "near" in found[0][1] and all(locality in found[0][1] for locality in SIDES)
    with pytest.raises(ConfigError, match="is not a directory|does not exist"):
        check_rewards([RewardConfig(type="grounding", options={"path": "./nothing"})], [])


@torch.no_grad()
def test_git_answers_yes_or_no_about_each_noun(git):
    images = np.random.default_rng(0).integers(256, size=(4, 32, 32, 3), dtype=np.uint8)
    records = [
        {"nouns": ["car", "zebra"], "attr_nouns": ["red car", "zebra"], "task_type": "color"},
        {"nouns": ["cup"], "attr_nouns": None, "task_type": "object"},
        {"nouns": ["car", "zebra"], "task_type": "spatial"},
        {"nouns": []},
    ]
    prompts = [Prompt(i, "x", record) for i, record in enumerate(records)]
    config = RewardConfig(type="git_vqa", options={"path": str(git), "device": "cpu", "batch_size": 2})
    assert check_rewards([config], prompts) == []
    output = build_rewards([config])[0][1].score(images, prompts)
    assert output.valid.all() and output.scores[2:].tolist() == [0, 1]

    model, tokenizer = GitForCausalLM.from_pretrained(git).eval(), PreTrainedTokenizerFast.from_pretrained(git)
    processor = CLIPImageProcessorPil.from_pretrained(git)

    def share(image: np.ndarray, noun: str) -> float:
        tokens = [BERT_WORDS.index("[CLS]"), *tokenizer(f"{noun}?", add_special_tokens=False)["input_ids"]]
        pixels = processor([image], return_tensors="pt")["pixel_values"]
        logits = model(input_ids=torch.tensor([tokens]), pixel_values=pixels).logits[0, -1].softmax(-1)
        yes, no = logits[BERT_WORDS.index("yes")], logits[BERT_WORDS.index("no")]
        return float(yes / (yes + no))

    expected = np.mean([share(images[0], "red car"), share(images[0], "zebra")])
    assert output.scores[0] == pytest.approx(expected, abs=1e-5)
    assert output.details[1] == {"cup": pytest.approx(share(images[1], "cup"), abs=1e-5)}
    ((_, why),) = check_rewards([config], [Prompt(0, "x", {"nouns": "cup"})])
    assert "no list of texts" in why
