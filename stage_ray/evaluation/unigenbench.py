"""UniGenBench (arXiv 2508.20751): 600 prompts with 1,813 test points, in ten dimensions and 27 finer ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import Benchmark, answers_by_kind
from stage_ray.records import Prompt

ASKED = (
    'This image was drawn for the prompt "{prompt}". Look at one point only, {point}: {what}. '
    "Judge what can be seen and nothing else. Does the image show it as the prompt asks? Answer yes or no."
)


class UniGenBenchmark(Benchmark):
    """The share of test points that are met, by dimension, and the mean over the ten; finer ones stand aside."""

    name, headline = "unigenbench", "UniGenBench"
    source = "https://github.com/CodeGoat24/UniGenBench, data/test_prompts_en.csv"
    counts = {"all": 600}
    images_per_prompt = 4
    rewards = (RewardConfig(type="vlm_questions"),)
    note = (
        "a question for each test point, answered by the model that was named; the official judges, Gemini 2.5 Pro and "
        "UniGenBench-EvalModel, see all points of a prompt at once"
    )

    def prepare(self, prompts: list[Prompt]) -> list[Prompt]:
        """With a question for each test point."""
        return [replace(prompt, record={**prompt.record, "questions": _questions(prompt)}) for prompt in prompts]

    def is_aside(self, metric: str) -> bool:
        """Finer dimensions, such as ``Attribute - Color``."""
        return " - " in metric

    def values(
        self, prompt: Prompt, scores: Mapping[str, float | None], details: Mapping[str, Mapping[str, Any]]
    ) -> Mapping[str, float | Sequence[float]]:
        """Of one image."""
        judge, score = next(iter(scores.items()), ("", None))
        if score is None:
            return {}
        points = [question["point"] for question in prompt.record["questions"]]
        return answers_by_kind(points, details[judge]["answers"])

    def picture(self, prompt: Prompt, image: int) -> str:
        """By the prompt's number in the CSV."""
        return f"{prompt.record['index']}_{image}.png"


def _questions(prompt: Prompt) -> list[dict[str, str]]:
    try:
        points = json.loads(prompt.record["sub_dims_en"])
        pairs = list(zip(points["Testpoints"], points["Testpoint Description"], strict=True))
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{prompt.where}: sub_dims_en holds no test points ({error!r}); is it UniGenBench's?"
        ) from error
    return [
        {"question": ASKED.format(prompt=prompt.text, point=point, what=what), "point": point} for point, what in pairs
    ]
