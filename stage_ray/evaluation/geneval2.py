"""GenEval 2 (arXiv 2512.16853): 800 prompts of three to ten atoms, judged by Soft-TIFA."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import Benchmark
from stage_ray.files import atomic_write, read_json
from stage_ray.records import Prompt

PATHS = "image_paths.json"


class GenEval2Benchmark(Benchmark):
    """Probabilities of the right answers: their geometric mean over a prompt's questions by atoms, and over all
    prompts as ``Soft-TIFA GM``; their mean by skill, and as ``Soft-TIFA AM``."""

    name, headline = "geneval2", "Soft-TIFA GM"
    source = "https://github.com/facebookresearch/GenEval2, geneval2_data.jsonl"
    counts = {f"{atoms} atoms": 100 for atoms in range(3, 11)}
    rewards = (RewardConfig(type="vlm_questions", options={"mode": "logprobs"}),)
    note = "Soft-TIFA by the model that was named; the official judge is Qwen3-VL-8B-Instruct"

    def prepare(self, prompts: list[Prompt]) -> list[Prompt]:
        """With the questions of ``vqa_list``, in the words of its code."""
        return [replace(prompt, record={**prompt.record, "questions": _questions(prompt)}) for prompt in prompts]

    def category(self, prompt: Prompt) -> str:
        """The number of atoms."""
        return f"{prompt.record.get('atom_count')} atoms"

    def is_aside(self, metric: str) -> bool:
        """Skills and the arithmetic mean."""
        return metric != self.headline and metric not in self.counts

    def values(
        self, prompt: Prompt, scores: Mapping[str, float | None], details: Mapping[str, Mapping[str, Any]]
    ) -> Mapping[str, float | Sequence[float]]:
        """Of one image."""
        judge, score = next(iter(scores.items()), ("", None))
        if score is None:
            return {}
        answers = details[judge]["answers"]
        geometric = float(np.prod(answers) ** (1 / len(answers)))
        skills: dict[str, list[float]] = {}
        for skill, answer in zip(prompt.record["skills"], answers, strict=True):
            skills.setdefault(skill, []).append(answer)
        return {self.category(prompt): geometric, self.headline: geometric, "Soft-TIFA AM": score, **skills}

    def save_pictures(self, directory: Path, prompt: Prompt, images: np.ndarray) -> None:
        """Beside the pictures lies the JSON that leads from prompts to them."""
        super().save_pictures(directory, prompt, images)
        paths = {
            **(read_json(directory / PATHS) or {}),
            prompt.text: str((directory / self.picture(prompt, 0)).resolve()),
        }
        atomic_write(directory / PATHS, json.dumps(paths, indent=1))


def _questions(prompt: Prompt) -> list[dict[str, str]]:
    pairs, skills = prompt.record.get("vqa_list") or [], prompt.record.get("skills") or []
    if not pairs or len(pairs) != len(skills):
        raise ConfigError(f"{prompt.where}: needs a vqa_list, and as many skills; is it geneval2_data.jsonl?")
    return [{"question": f"{question} Answer in one word.", "answer": answer} for question, answer in pairs]
