"""Who has which attribute, in ShapeWorld: 96 prompts that no reward knows, judged by exact rules over its detector."""

from __future__ import annotations

from stage_ray.config import RewardConfig
from stage_ray.evaluation.geneval import GenEvalBenchmark
from stage_ray.evaluation.shapeworld import JUDGE


class BindingBenchmark(GenEvalBenchmark):
    """Three coloured objects, relative size, background, and held-out prompts in other words; 24 prompts each."""

    name, headline = "binding", "binding"
    prompts = "package:stage_ray/shapeworld/assets/prompts/binding.jsonl"
    rewards = (RewardConfig.model_validate(JUDGE | {"type": "binding"}),)
    note = ""
