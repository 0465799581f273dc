"""GenEval's eyes on photographs: the arithmetic by hand, and small models of the published classes end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.pipeline.geneval_prompts import geneval_prompts
from stage_ray.records import Prompt
from stage_ray.rewards import build_rewards, check_rewards
from stage_ray.rewards.coco import COLORS, OBJECTS
from stage_ray.rewards.detection import Detection
from stage_ray.rewards.mask2former import Frame, Mask2FormerDetector, class_names, crop, instances
from tests.rewards.checkpoints import LABELS, save_clip, save_mask2former


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    mask2former = save_mask2former(tmp_path_factory.mktemp("mask2former"))
    return {"path": str(mask2former), "clip": str(save_clip(tmp_path_factory.mktemp("clip")))}


def config(**options) -> RewardConfig:
    return RewardConfig(type="geneval", options={"detector_options": {"device": "cpu"} | options})


def test_a_confidence_is_the_class_times_the_masks_mean_and_the_box_its_extent():
    names, frame = ["person", "bicycle"], Frame((8, 8), (8, 8), (8, 8))
    classes = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    masks = torch.full((2, 8, 8), -9.0)
    masks[0, 2:5, 1:7] = 2.0
    masks[1, 4:8, 0:3] = 0.5
    first, second = instances(classes, masks, frame, names, 0.0)[:2]
    share = classes.softmax(-1)
    assert (first.label, first.box) == ("person", (1.0, 2.0, 7.0, 5.0))
    assert first.confidence == pytest.approx(float(share[0, 0] * torch.tensor(2.0).sigmoid()), abs=1e-5)
    assert (second.label, second.box) == ("bicycle", (0.0, 4.0, 3.0, 8.0))
    assert second.confidence == pytest.approx(float(share[1, 1] * torch.tensor(0.5).sigmoid()), abs=1e-5)
    assert first.mask.sum() == 18 and first.mask[4, 1] and second.mask[4, 1]  # overlaps are kept


def test_padding_is_cut_off_before_a_mask_takes_the_images_size():
    frame = Frame(padded=(8, 8), resized=(4, 8), image=(8, 16))  # a wide picture in the upper half
    masks = torch.full((1, 8, 8), -9.0)
    masks[0, 0:2, 0:4] = 9.0
    masks[0, 4:, :] = 9.0  # over the padding
    (one,) = instances(torch.tensor([[9.0, 0.0]]), masks, frame, ["person"], 0.3)
    assert one.box == (0.0, 0.0, 8.0, 4.0) and one.mask.shape == (8, 16)


def test_a_query_may_be_two_classes_and_what_is_unsure_or_empty_is_none():
    classes = torch.tensor([[2.0, 1.9, 0.0], [5.0, 0.0, 0.0]])
    masks = torch.stack([torch.full((4, 4), 3.0), torch.full((4, 4), -3.0)])  # the second is nowhere
    frame = Frame((4, 4), (4, 4), (4, 4))
    assert [one.label for one in instances(classes, masks, frame, ["person", "bicycle"], 0.3)] == ["person", "bicycle"]
    assert instances(classes, masks, frame, ["person", "bicycle"], 0.5) == []


def test_classes_get_genevals_names_and_others_are_refused():
    assert class_names(LABELS, "x") == list(OBJECTS)
    with pytest.raises(ConfigError, match="path 'x' knows a class 'wall'"):
        class_names({0: "person", 1: "wall"}, "x")


def test_a_crop_is_the_object_on_grey():
    image = np.full((6, 6, 3), 200, np.uint8)
    mask = np.zeros((6, 6), bool)
    mask[1:3, 2:5] = True
    mask[1, 2] = False
    cut = crop(image, Detection("dog", 0.9, (2.0, 1.0, 5.0, 3.0), mask=mask))
    assert cut.shape == (2, 3, 3) and (cut[0, 0] == 0x99).all() and (cut[1] == 200).all()


@torch.no_grad()
def test_small_models_of_the_published_classes_judge_end_to_end(checkpoints):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(1, 40, 60, 3), dtype=np.uint8)
    detector = Mask2FormerDetector(**checkpoints, min_confidence=0.0, device="cpu")
    found = detector.detect(images)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(checkpoints["path"]).eval()
    processor = Mask2FormerImageProcessorPil.from_pretrained(checkpoints["path"])
    inputs = processor(list(images), return_tensors="pt", size={"shortest_edge": 800, "longest_edge": 1333})
    assert inputs["pixel_values"].shape[2:] == (800, 1216)  # 800 x 1200, padded to a multiple of 32
    output = model(inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
    for image, seen in enumerate(found):
        assert seen and all(a.confidence >= b.confidence for a, b in zip(seen, seen[1:], strict=False))
        shares = output.class_queries_logits[image].softmax(-1)[:, :-1]
        query, label = divmod(int(shares.flatten().argmax()), 80)
        logits = F.interpolate(output.masks_queries_logits[image : image + 1], (800, 1216), mode="bilinear")
        logits = F.interpolate(logits[:, :, :800, :1200], (40, 60), mode="bilinear")[0, query]
        expected = float(shares[query, label] * logits.sigmoid()[logits > 0].mean())
        assert any(one.label == OBJECTS[label] and one.confidence == pytest.approx(expected, abs=1e-4) for one in seen)
        assert {one.color for one in seen} <= set(COLORS) and all(0.1 <= one.color_confidence <= 1 for one in seen)

    record = geneval_prompts("geneval:test")[0]
    scorer = build_rewards([config(**checkpoints, min_confidence=0.0)])[0][1]
    output = scorer.score(images[:1], [Prompt(0, record["prompt"], record)])
    assert output.valid.all() and output.details[0]["verdict"] is False


def test_a_colour_is_the_most_similar_of_ten_by_the_mean_of_three_sentences(checkpoints):
    detector = Mask2FormerDetector(**checkpoints, device="cpu")
    towers = detector._towers
    images = np.random.default_rng(1).integers(256, size=(1, 40, 40, 3), dtype=np.uint8)
    ring = Detection("dog", 0.9, (0.0, 0.0, 30.0, 40.0))
    (one,) = detector._with_colors(images, [[ring]])[0]
    rows = []
    for color in COLORS:
        texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        rows.append(F.normalize(towers.texts(texts).mean(0), dim=-1))
    picture = np.asarray(Image.fromarray(images[0]).crop((0, 0, 30, 40)))
    cosines = torch.stack(rows) @ towers.images(picture[None])[0]
    shares = (towers.logit_scale * cosines).softmax(-1)
    assert one.color == COLORS[int(cosines.argmax())]
    assert one.color_confidence == pytest.approx(float(shares.max()), abs=1e-5)


def test_checkpoints_that_lead_nowhere_are_refused_before_a_run(checkpoints, tmp_path):
    prompt = Prompt(0, "a photo of a dog", {"include": [{"class": "dog"}]})
    assert check_rewards([config(**checkpoints)], [prompt]) == []
    ((_, why),) = check_rewards([config(**checkpoints)], [Prompt(0, "a ring", {"include": [{"class": "ring"}]})])
    assert "asks in include[0] for class 'ring', unknown here" in why
    with pytest.raises(ConfigError, match=r"detector_options.pth is no option of mask2former; did you mean 'path'\?"):
        check_rewards([config(pth="x")], [])
    with pytest.raises(ConfigError, match="holds a 'clip' model, but it needs 'mask2former'"):
        check_rewards([config(path=checkpoints["clip"], clip=checkpoints["clip"])], [])
    other = Path(shutil.copytree(checkpoints["path"], tmp_path / "ade"))
    labels = json.loads((other / "config.json").read_text())
    labels["id2label"]["0"] = "wall"
    (other / "config.json").write_text(json.dumps(labels))
    with pytest.raises(ConfigError, match="knows a class 'wall'"):
        check_rewards([config(path=str(other), clip=checkpoints["clip"])], [])
