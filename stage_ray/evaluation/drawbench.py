"""DrawBench (Imagen, arXiv 2205.11487): 200 prompts of eleven kinds, by three scorers of human preference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stage_ray.config import RewardConfig
from stage_ray.evaluation.base import Benchmark
from stage_ray.records import Prompt


class DrawBenchBenchmark(Benchmark):
    """ImageReward by category and, as the headline, over all images; beside it HPS v2.1 (times 100) and aesthetics."""

    name, headline, category_key, aside = "drawbench", "ImageReward", "Category", ("hps", "aesthetic")
    source = "Imagen's DrawBench, as CSV with the columns Prompts and Category"
    images_per_prompt = 4
    counts = {
        **{"Colors": 25, "Conflicting": 10, "Counting": 19, "DALL-E": 20, "Descriptions": 20, "Gary Marcus et al.": 10},
        **{"Misspellings": 10, "Positional": 20, "Rare Words": 7, "Reddit": 38, "Text": 21},
    }
    rewards = (
        RewardConfig(type="image_reward"),
        RewardConfig(type="hps", options={"scale": 100.0}),
        RewardConfig(type="aesthetic"),
    )
    note = "the published scorers; DrawBench itself was judged by people, two models side by side"

    def values(
        self, prompt: Prompt, scores: Mapping[str, float | None], details: Mapping[str, Mapping[str, Any]]
    ) -> Mapping[str, float]:
        """ImageReward for its category and for all, and the other scorers' means."""
        found = {name: score for name, score in scores.items() if score is not None and name in self.aside}
        score = scores.get("image_reward")
        return found | ({} if score is None else {self.category(prompt): score, self.headline: score})
