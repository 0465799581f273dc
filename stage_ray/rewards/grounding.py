"""GroundingDINO as a reward: are the nouns there, in the right place and number? T2I-R1's (arXiv 2505.00703), mended.

The rules are pure functions over `Boxes`: what was found of each noun, most confident first. ``published`` gives the
released code's results, errors included: "above" and "on top of" score nothing; "near" holds everywhere, since it
compares shares of the picture with 150 pixels; boxes are suppressed by their centres and sizes read as corners; a noun
of three words or more is never found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from transformers import GroundingDinoForObjectDetection

from stage_ray.records import Prompt
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.clip import BatchSize
from stage_ray.rewards.models import Dtype, check_model, load_image_processor, load_model, load_tokenizer

PUBLISHED = "IDEA-Research/grounding-dino-tiny"
SIZE = {"shortest_edge": 800, "longest_edge": 1333}
OVERLAP, NEAR_PIXELS, SAME_OBJECT = 0.1, 150.0, 0.5  # intersection over union; pixels; intersection over union
NEAR = ("next to", "near", "on side of")
SIDES = {  # of obj1 seen from obj2: the axis, and the sign of the way from obj1 to obj2
    **dict.fromkeys(("on the left of", "left of"), (0, 1)),
    **dict.fromkeys(("on the right of", "right of"), (0, -1)),
    **dict.fromkeys(("on the top of", "top of", "on top of", "above"), (1, 1)),
    **dict.fromkeys(("on the bottom of", "bottom of", "below"), (1, -1)),
}
UNHANDLED = ("on top of", "above", "bottom of")  # by the released code

Boxes = Mapping[str, np.ndarray]  # noun -> float [K, 4], (x1, y1, x2, y2), most confident first


class GroundingReward:
    """By the record's ``task_type``; 0..1, and 1 where a prompt has no nouns.

    ``spatial``: 0.2 for each of the two objects, and half of how well they stand (at most 0.9). ``numeracy``: for each
    object its share, a fifth of it where the number is wrong. Else the share of nouns that are found. Details of an
    image: how often each noun was found.
    """

    def __init__(
        self,
        path: str = PUBLISHED,
        threshold: Annotated[float, Field(ge=0, le=1)] = 0.3,
        published: bool = False,
        batch_size: BatchSize = 8,
        dtype: Dtype = "float32",
        device: str | None = None,
    ) -> None:
        """Load the checkpoint (Apache-2.0).

        Args:
            path: of GroundingDINO in transformers' layout, a directory or hub id.
            threshold: mean probability over a noun's words above which a box counts.
            published: with the released code's errors.
            batch_size, dtype, device: as of `ClipReward`.
        """
        self._model, location = load_model(GroundingDinoForObjectDetection, path=path, dtype=dtype, device=device)
        self._tokenizer, self._processor = load_tokenizer(location), load_image_processor(location)
        self._threshold, self._published, self._batch_size = threshold, published, batch_size

    @classmethod
    def check(cls, prompts: Sequence[Prompt], path: str = PUBLISHED, **options: Any) -> Iterator[tuple[Prompt, str]]:
        """Check a local checkpoint, and what records ask for; see `Reward`."""
        if (location := check_model(GroundingDinoForObjectDetection, path=path, tensors=False)) is not None:
            load_tokenizer(location)
            load_image_processor(location)
        for prompt in prompts:
            if wrong := fault(prompt.record):
                yield prompt, wrong

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt's record."""
        scores = np.full(len(images), np.nan, np.float32)
        details: list[dict[str, Any]] = [{} for _ in prompts]
        judged = []
        for row, prompt in enumerate(prompts):
            if wrong := fault(prompt.record):
                details[row]["error"] = f"prompt {prompt.text!r} {wrong}"
            elif nouns_of(prompt.record):
                judged.append(row)
            else:
                scores[row] = 1.0
        for start in range(0, len(judged), self._batch_size):
            rows = judged[start : start + self._batch_size]
            found = self._find(images[rows], [nouns_of(prompts[row].record) for row in rows])
            for row, boxes in zip(rows, found, strict=True):
                scores[row] = grounding_score(prompts[row].record, boxes, published=self._published)
                details[row] = {noun: len(each) for noun, each in boxes.items()}
        return RewardOutput(scores, np.isfinite(scores), tuple(details))

    @torch.inference_mode()
    def _find(self, images: np.ndarray, nouns: Sequence[Sequence[str]]) -> list[Boxes]:
        """What is found of each image's nouns, in pixels; if published as (cx, cy, w, h), shares of the sides."""
        pictures = [Image.fromarray(image) for image in images]
        inputs = self._processor(pictures, return_tensors="pt", size=SIZE)
        captions = [" . ".join(each) + "." for each in nouns]
        text = self._tokenizer(captions, padding=True, return_tensors="pt")
        device = self._model.device
        output = self._model(
            pixel_values=inputs["pixel_values"].to(device, self._model.dtype),
            pixel_mask=inputs["pixel_mask"].to(device),
            **{name: text[name].to(device) for name in ("input_ids", "attention_mask", "token_type_ids")},
        )
        height, width = images.shape[1:3]
        found: list[Boxes] = []
        for row, each in enumerate(nouns):
            words = self._words(text, row, each).to(device)  # [nouns, text]
            shares = words @ output.logits[row].float().sigmoid()[:, : words.shape[1]].T  # [nouns, queries]
            boxes = output.pred_boxes[row].float().cpu().numpy()  # [queries, 4]: cx, cy, w, h
            if not self._published:
                corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
                boxes = corners * np.asarray([width, height, width, height])
            order = shares.cpu().numpy()
            found.append({noun: boxes[self._best(line)] for noun, line in zip(each, order, strict=True)})
        return found

    def _best(self, shares: np.ndarray) -> np.ndarray:
        ranked = np.argsort(-shares, kind="stable")
        return ranked[shares[ranked] > self._threshold]

    def _words(self, text: Any, row: int, nouns: Sequence[str]) -> Tensor:
        """For each noun, the weights of its words' tokens, float32 [nouns, text], each row summing to 1."""
        weights = torch.zeros(len(nouns), text["input_ids"].shape[1])
        start = 0
        for index, noun in enumerate(nouns):
            words = noun.split(" ")
            if not (self._published and len(words) > 2):  # published: three words never match, and weigh nothing
                for character in range(start, start + len(noun)):
                    if (token := text.char_to_token(row, character)) is not None:
                        weights[index, token] = 1
            start += len(noun) + len(" . ")
        return weights / (weights.sum(1, keepdim=True) + 1e-6)


def nouns_of(record: Mapping[str, Any]) -> list[str]:
    """The nouns that are looked for, each once, in the order of the record."""
    return [noun.strip() for noun in dict.fromkeys(record.get("nouns") or ())]


def fault(record: Mapping[str, Any]) -> str:
    """Why a record cannot be judged; "" where it can."""
    nouns = record.get("nouns")
    if nouns is not None and (isinstance(nouns, str) or not all(isinstance(noun, str) for noun in nouns)):
        return f'has "nouns": {nouns!r:.60}, which is no list of texts, as in ["car", "zebra"]'
    if not nouns:
        return ""
    task, known = record.get("task_type"), set(nouns_of(record))
    if task == "spatial":
        info = record.get("spatial_info")
        if not isinstance(info, Mapping) or not {info.get("obj1"), info.get("obj2")} <= known:
            return f'is spatial, and its "spatial_info" {info!r:.80} does not name two of its nouns'
        if info.get("locality") not in (*SIDES, *NEAR):
            return f"asks for locality {info.get('locality')!r}, which is none of {', '.join((*SIDES, *NEAR))}"
    if task == "numeracy":
        info = record.get("numeracy_info")
        items = info if isinstance(info, Sequence) and info else [None]
        if not all(isinstance(item, Mapping) and item.get("obj_name") in known and "num" in item for item in items):
            return f'is of numeracy, and its "numeracy_info" {info!r:.80} is not like [{{"obj_name": "cup", "num": 4}}]'
    return ""


def grounding_score(record: Mapping[str, Any], boxes: Boxes, *, published: bool = False) -> float:
    """The score of what was found; ``boxes`` in pixels, or as `GroundingReward._find` has them if ``published``."""
    task = record.get("task_type")
    if task == "spatial":
        info = record["spatial_info"]
        first, second = (boxes.get(info[name], np.empty((0, 4))) for name in ("obj1", "obj2"))
        score = 0.2 * (len(first) > 0) + 0.2 * (len(second) > 0)
        if len(first) and len(second):
            pair = [_corners(box) for box in (first[0], second[0])] if published else [first[0], second[0]]
            score += _position(info["locality"], pair[0], pair[1], published) / 2
        return float(score)
    if task == "numeracy":
        items = record["numeracy_info"]
        parts = []
        for item in items:
            number = len(distinct(boxes.get(item["obj_name"], np.empty((0, 4)))))
            parts.append(0.0 if number == 0 else 1.0 if number == int(item["num"]) else 0.2)
        return sum(parts) / len(items)
    nouns = nouns_of(record)
    return sum(len(boxes.get(noun, ())) > 0 for noun in nouns) / len(nouns)


def _position(locality: str, first: np.ndarray, second: np.ndarray, published: bool) -> float:
    """How well ``first`` stands to ``second``, 0..1, both (x1, y1, x2, y2)."""
    way = (second[:2] + second[2:] - first[:2] - first[2:]) / 2  # from centre to centre
    if locality in NEAR:
        return 1.0 if np.abs(way).min() < NEAR_PIXELS else float(NEAR_PIXELS / np.abs(way).max())
    if published and locality in UNHANDLED:
        return 0.0
    axis, sign = SIDES[locality]
    if way[axis] * sign <= 0 or abs(way[axis]) <= abs(way[1 - axis]):
        return 0.0
    shared = overlap(first, second)
    return 1.0 if shared < OVERLAP else OVERLAP / shared


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    shared = float(np.clip(sides, 0, None).prod())
    whole = sum(float(np.clip(box[2:] - box[:2], 0, None).prod()) for box in (first, second)) - shared
    return shared / whole if whole > 0 else 0.0


def distinct(boxes: np.ndarray) -> list[np.ndarray]:
    """Boxes without those that overlap a more confident one by more than half (non-maximum suppression)."""
    kept: list[np.ndarray] = []
    for box in boxes:
        if all(overlap(box, other) <= SAME_OBJECT for other in kept):
            kept.append(box)
    return kept


def _corners(box: np.ndarray) -> np.ndarray:
    return np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])
