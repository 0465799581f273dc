"""DPG-Bench (ELLA, arXiv 2403.05135): 1,065 dense prompts, each with a graph of yes/no questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import Benchmark, answers_by_kind
from stage_ray.records import Prompt

KINDS = ("global", "entity", "attribute", "relation", "other")


class DpgBenchmark(Benchmark):
    """``DPG-Bench``, 0..100: the mean over images of the share of yes, where a question counts no whose parent does.

    Kinds of questions and, aside, their finer categories: the share of yes over all questions, without parents.
    """

    name, headline = "dpg", "DPG-Bench"
    source = "https://github.com/TencentQQGYLab/ELLA, dpg_bench/dpg_bench.csv"
    counts = {"all": 1065}
    images_per_prompt = 4
    rewards = (RewardConfig(type="vlm_questions"),)
    note = "questions answered by the model that was named; the official judge is mPLUG-large, whose figures are others"

    def prepare(self, prompts: list[Prompt]) -> list[Prompt]:
        """One prompt of the lines with its ``item_id``, each of which is a question."""
        items: dict[str, list[Prompt]] = {}
        for line in prompts:
            items.setdefault(str(line.record.get("item_id")), []).append(line)
        return [replace(lines[0], record=_record(item, lines)) for item, lines in items.items()]

    def is_aside(self, metric: str) -> bool:
        """Finer categories, such as ``entity - whole``."""
        return " - " in metric

    def values(
        self, prompt: Prompt, scores: Mapping[str, float | None], details: Mapping[str, Mapping[str, Any]]
    ) -> Mapping[str, float | Sequence[float]]:
        """Of one image."""
        judge, score = next(iter(scores.items()), ("", None))
        if score is None:
            return {}
        kinds = [question["kind"] for question in prompt.record["questions"]]
        answers = [100 * answer for answer in details[judge]["answers"]]
        return {**answers_by_kind(kinds, answers), self.headline: 100 * score}

    def picture(self, prompt: Prompt, image: int) -> str:
        """The images of a prompt in one grid, under the item's name."""
        return f"{prompt.record['item_id']}.png"


def _record(item: str, lines: Sequence[Prompt]) -> dict[str, Any]:
    rows = [line.record for line in lines]
    try:
        numbers = {int(row["proposition_id"]): number for number, row in enumerate(rows)}
        parents = [[int(one) for one in str(row["dependency"]).split(",")] for row in rows]
        questions = [
            {
                "question": f"{row['question_natural_language']} Answer yes or no.",
                "kind": row["tuple"].partition("(")[0].strip(" -"),
                "parents": [numbers[one] for one in each if one],  # 0: it has none
            }
            for row, each in zip(rows, parents, strict=True)
        ]
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{lines[0].where}: {error!r} in the lines of item {item}; is it dpg_bench.csv?") from error
    return {"prompt": lines[0].text, "item_id": item, "questions": questions}
