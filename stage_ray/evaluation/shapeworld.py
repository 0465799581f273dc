"""GenEval's six tasks in ShapeWorld: its 100 held-out prompts, judged by its detector."""

from __future__ import annotations

from stage_ray.config import RewardConfig
from stage_ray.evaluation.geneval import GenEvalBenchmark

DETECTOR = "stage_ray.shapeworld.detector.ShapeDetector"
JUDGE = {"type": "geneval", "options": {"detector": DETECTOR, "threshold": 0.5, "counting_threshold": 0.5}}


class ShapeWorldBenchmark(GenEvalBenchmark):
    """As `GenEvalBenchmark`, for models that draw shapes."""

    name = "shapeworld"
    prompts = "package:stage_ray/shapeworld/assets/prompts/heldout.jsonl"
    rewards = (RewardConfig.model_validate(JUDGE),)
