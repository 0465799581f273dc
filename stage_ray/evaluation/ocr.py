"""Text in pictures: how much of the quoted text of Flow-GRPO's (arXiv 2505.05470) 1,018 test prompts OCR reads."""

from __future__ import annotations

from stage_ray.config import RewardConfig
from stage_ray.evaluation.base import Benchmark


class OcrBenchmark(Benchmark):
    """The mean of `OcrReward` over images, 0..1."""

    name = "ocr"
    headline = "OCR accuracy"
    source = "https://github.com/yifan123/flow_grpo (dataset/ocr/test.txt)"
    counts = {"all": 1018}
    rewards = (RewardConfig(type="ocr"),)
