"""Text in pictures: the 1,018 test prompts of Flow-GRPO (arXiv 2505.05470), on which STAGE reports its OCR accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stage_ray.config import RewardConfig
from stage_ray.evaluation.base import Benchmark
from stage_ray.records import Prompt


class OcrBenchmark(Benchmark):
    """``OCR accuracy`` is the mean score of `OcrReward`; ``exact`` the share of pictures whose text is all right."""

    name, headline, aside = "ocr", "OCR accuracy", ("exact",)
    source = "https://github.com/yifan123/flow_grpo, dataset/ocr/test.txt"
    counts = {"all": 1018}
    rewards = (RewardConfig(type="ocr"),)
    note = "the official formula, read by PP-OCRv6; published figures were read by PaddleOCR 2's English models"

    def values(
        self, prompt: Prompt, scores: Mapping[str, float | None], details: Mapping[str, Mapping[str, Any]]
    ) -> Mapping[str, float]:
        """The score, and whether it is 1."""
        score = next(iter(scores.values()), None)
        return {} if score is None else {self.headline: score, "exact": float(score == 1)}
