"""HPSv2's benchmark (Wu et al., arXiv 2306.09341): four styles of 800 prompts, by the human preference score v2.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stage_ray.config import RewardConfig
from stage_ray.evaluation.base import Benchmark
from stage_ray.records import Prompt


class Hpsv2Benchmark(Benchmark):
    """Each style's mean of 100 times the cosine, and that over all images, ``HPSv2.1``."""

    name, headline, category_key = "hpsv2", "HPSv2.1", "style"
    source = "https://huggingface.co/datasets/zhwang/HPDv2, benchmark/*.json"
    files = {style: f"{style}.json" for style in ("anime", "concept-art", "paintings", "photo")}
    counts = dict.fromkeys(files, 800)
    rewards = (RewardConfig(type="hps", options={"scale": 100.0}),)
    note = "the official scorer, HPS v2.1; figures of its v2.0 are on another scale"

    def values(
        self, prompt: Prompt, scores: Mapping[str, float | None], details: Mapping[str, Mapping[str, Any]]
    ) -> Mapping[str, float]:
        """The score, for its style and for all."""
        score = next(iter(scores.values()), None)
        return {} if score is None else {self.category(prompt): score, self.headline: score}

    def picture(self, prompt: Prompt, image: int) -> str:
        """Where hpsv2's ``evaluate`` looks: by style and the prompt's number in it."""
        return f"{prompt.record['style']}/{prompt.record['number']:05d}.jpg"
