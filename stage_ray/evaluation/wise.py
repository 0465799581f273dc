"""WISE (arXiv 2503.07265): 1,000 prompts that take knowledge of the world; WISE_Verified, and the first release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import Benchmark
from stage_ray.records import Prompt

PARTS = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
ABOUT = 'An image was drawn for the prompt "{prompt}". What it should show: {explanation}\n'
RIGHT = (
    "Is the image right in what the explanation asks for, its objects, states and relations, and clear enough to tell? "
    "In doubt it is not. Answer yes or no."
)
POINTS = {
    "consistency": (
        0.7,
        "How fully and exactly does the image show this? 0: it misses what matters, 1: in part, 2: all of it.",
    ),
    "realism": (
        0.2,
        "How real does it look? 0: impossible and artificial, 1: with visible flaws, 2: like a photograph.",
    ),
    "aesthetics": (0.1, "How well is it made as a picture? 0: poorly, 1: decently, 2: like a masterpiece."),
}


class WiseBenchmark(Benchmark):
    """WISE_Verified: the share of images that are right, by field, and over all prompts as ``WiScore``."""

    name, headline = "wise", "WiScore"
    source = "https://github.com/PKU-YuanGroup/WISE, data_verified"
    files: Mapping[str, str] = {part: f"{part}_verified.json" for part in PARTS}
    category_key = "part"
    counts: Mapping[str, int] = dict(culture=400, time=120, space=120, biology=120, physics=120, chemistry=120)
    rewards = (RewardConfig(type="vlm_questions"),)
    note = "WISE_Verified, judged by the model that was named; the official judge is Qwen3.5-35B-A3B, in longer words"

    def prepare(self, prompts: list[Prompt]) -> list[Prompt]:
        """With the question, or the three, that the judge is asked."""
        return [
            replace(prompt, record={**prompt.record, "questions": self.questions(_about(prompt))}) for prompt in prompts
        ]

    def questions(self, about: str) -> list[dict[str, Any]]:
        """What the judge is asked; ``about``: prompt and explanation."""
        return [{"question": about + RIGHT}]

    def category(self, prompt: Prompt) -> str:
        """The field, by the prompt's number: they follow one another from 1 on."""
        number = prompt.record.get("prompt_id")
        ends = zip(self.counts, accumulate(self.counts.values()), strict=True)
        return next((field for field, end in ends if isinstance(number, int) and number <= end), "all")

    def values(
        self, prompt: Prompt, scores: Mapping[str, float | None], details: Mapping[str, Mapping[str, Any]]
    ) -> Mapping[str, float]:
        """Of one image; the official weights of the fields are their shares of the prompts."""
        judge, score = next(iter(scores.items()), ("", None))
        if score is None:
            return {}
        score = self.score(details[judge]["answers"])
        return {self.category(prompt): score, self.headline: score}

    def score(self, answers: list[float]) -> float:
        """The WiScore of an image, 0..1."""
        return answers[0]

    def picture(self, prompt: Prompt, image: int) -> str:
        """By the prompt's number."""
        return f"{prompt.record['prompt_id']}.png"


class FirstWise(WiseBenchmark):
    """The first release: 0 to 2 points for consistency, realism and aesthetics, weighted 0.7, 0.2 and 0.1."""

    name, source = "wise_first", "https://github.com/PKU-YuanGroup/WISE, WISE_legacy/data"
    files = {part: f"{part}.json" for part in PARTS}
    counts = dict(culture=400, time=167, space=133, biology=100, physics=100, chemistry=100)
    note = "WISE's first release, judged by the model that was named; the official judge is GPT-4o (2024-05-13)"

    def questions(self, about: str) -> list[dict[str, Any]]:
        """One for each kind of points."""
        return [
            {"question": f"{about}{asked} Be strict. Answer with the number alone.", "highest": 2}
            for _, asked in POINTS.values()
        ]

    def score(self, answers: list[float]) -> float:
        """The weighted mean."""
        return sum(weight * answer for (weight, _), answer in zip(POINTS.values(), answers, strict=True))


def _about(prompt: Prompt) -> str:
    explanation = prompt.record.get("Explanation")
    if not explanation:
        raise ConfigError(f'{prompt.where}: has no "Explanation", by which WISE is judged; is it a file of its data?')
    return ABOUT.format(prompt=prompt.text, explanation=explanation)
