"""T2I-CompBench++ (arXiv 2307.06350): eight kinds of composition, 300 prompts each, ten images a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stage_ray.config import RewardConfig
from stage_ray.evaluation.base import Benchmark
from stage_ray.records import Prompt

KINDS = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
STAND_INS = {"spatial": "spatial (not UniDet)", "numeracy": "numeracy (not UniDet)"}
ARTICLE = r"(?:an? |the )?"
SPATIAL = re.compile(rf"{ARTICLE}(.+?) (next to|near|on side of|on the (?:left|right|top|bottom) of) {ARTICLE}(.+?)\.?")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
COUNTED = re.compile(rf"\b({'|'.join(NUMBERS)}) (\w+)", re.IGNORECASE)
PLURALS = {"women": "woman", "men": "man", "mice": "mouse", "knives": "knife", "people": "person", "sheep": "sheep"}


class T2ICompBenchmark(Benchmark):
    """CLIP's cosine of the non-spatial prompts, as official; spatial relations and numbers, by GroundingDINO's rules.

    The other kinds are drawn and not scored: BLIP-VQA, UniDet and depth are not here.
    """

    name, headline, category_key = "t2i_compbench", "non_spatial", "kind"
    source = "https://github.com/Karine-Huang/T2I-CompBench, examples/dataset"
    files = {kind: f"{kind}_val.txt" for kind in KINDS}
    counts = dict.fromkeys(KINDS, 300)
    images_per_prompt = 10
    aside = tuple(STAND_INS.values())
    rewards = (
        RewardConfig(type="clip", options={"path": "openai/clip-vit-base-patch32"}),
        RewardConfig(type="grounding"),
    )
    note = (
        "official is the CLIP score of non_spatial alone; spatial and numeracy are GroundingDINO's, not comparable to "
        "UniDet's; for the rest run the official BLIPvqa_eval, UniDet_eval and 3_in_1_eval on each folder of --pictures"
    )

    def prepare(self, prompts: list[Prompt]) -> list[Prompt]:
        """With the objects that the grounding scorer looks for, where a prompt's kind has them."""
        return [replace(prompt, record={**prompt.record, **_objects(prompt)}) for prompt in prompts]

    def values(
        self, prompt: Prompt, scores: Mapping[str, float | None], details: Mapping[str, Mapping[str, Any]]
    ) -> Mapping[str, float]:
        """The score of the scorer that knows the prompt's kind."""
        kind = self.category(prompt)
        score = scores.get("clip" if kind == self.headline else "grounding")
        metric = STAND_INS.get(kind, kind)
        return {metric: score} if score is not None and metric in (self.headline, *self.aside) else {}

    def picture(self, prompt: Prompt, image: int) -> str:
        """By kind, text, and a number in that kind."""
        number = prompt.record["number"] * self.images_per_prompt + image
        return f"{prompt.record['kind']}/samples/{prompt.text}_{number:06d}.png"


def _objects(prompt: Prompt) -> dict[str, Any]:
    """What T2I-R1's records hold (`GroundingReward`); nothing for a prompt that has no such form."""
    if prompt.record["kind"] == "spatial" and (found := SPATIAL.fullmatch(prompt.text)):
        one, locality, other = found.groups()
        info = {"obj1": one, "obj2": other, "locality": locality}
        return {"task_type": "spatial", "nouns": [one, other], "spatial_info": info}
    if prompt.record["kind"] == "numeracy" and (counted := COUNTED.findall(prompt.text)):
        items = [{"obj_name": _singular(noun), "num": NUMBERS.index(word.lower()) + 1} for word, noun in counted]
        return {"task_type": "numeracy", "nouns": [item["obj_name"] for item in items], "numeracy_info": items}
    return {}


def _singular(noun: str) -> str:
    """Of the plurals that the prompts have."""
    endings = (("ies", "y"), ("oes", "o"), ("shes", "sh"), ("ches", "ch"), ("xes", "x"), ("s", ""))
    if noun in PLURALS or noun.endswith(("ss", "us")):
        return PLURALS.get(noun, noun)
    return next((noun.removesuffix(ending) + one for ending, one in endings if noun.endswith(ending)), noun)
