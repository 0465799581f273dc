"""GenEval (arXiv 2310.11513): several images a prompt; the score is the mean over tasks of the mean strict verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stage_ray.config import RewardConfig
from stage_ray.evaluation.base import Benchmark
from stage_ray.records import Prompt


class GenEvalBenchmark(Benchmark):
    """GenEval's six tasks. Any prompts with its records are judged by the same rules, such as a run's own.

    Metrics, each 0..1: every task (the prompts' ``tag``; "all" for prompts without one), their mean ``GenEval``, and
    the mean ``soft score`` over images. A task counts the same however many prompts it has. The first scorer that
    gives a verdict for an image is its judge; an image without one counts in no metric.
    """

    name = "geneval"
    headline = "GenEval"
    aside = ("soft score",)
    prompts = "geneval:test"  # 553
    rewards = (RewardConfig(type="geneval"),)
    images_per_prompt = 4

    def values(
        self, prompt: Prompt, scores: Mapping[str, float | None], details: Mapping[str, Mapping[str, Any]]
    ) -> Mapping[str, float]:
        """The verdict by task, and the soft score."""
        judged = next((said for said in details.values() if "verdict" in said), None)  # None: every scorer failed
        if judged is None:
            return {}
        soft = judged.get("soft")
        return {self.category(prompt): float(judged["verdict"])} | ({} if soft is None else {"soft score": float(soft)})

    def picture(self, prompt: Prompt, image: int) -> str:
        """As GenEval's own generation writes it."""
        return f"{prompt.index:05d}/samples/{image:05d}.png"

    def save_pictures(self, directory: Path, prompt: Prompt, images: np.ndarray) -> None:
        """Beside the pictures lies ``metadata.jsonl``, the prompt's line, from which GenEval's own code judges."""
        super().save_pictures(directory, prompt, images)
        metadata = directory / f"{prompt.index:05d}" / "metadata.jsonl"
        metadata.write_text(json.dumps(dict(prompt.record)) + "\n", encoding="utf-8")
