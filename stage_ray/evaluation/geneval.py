"""GenEval (arXiv 2310.11513): several images a prompt; the score is the mean over tasks of the mean strict verdict."""

from __future__ import annotations

from collections.abc import Sequence

from stage_ray.config import RewardConfig
from stage_ray.evaluation.base import MetricValue, mean_of_metrics, mean_over_images
from stage_ray.records import Prompt, ScoredGroup
from stage_ray.rewards.geneval_rules import is_nothing

DETECTOR = "stage_ray.shapeworld.detector.ShapeDetector"
JUDGE = {"type": "geneval", "options": {"detector": DETECTOR, "threshold": 0.5, "counting_threshold": 0.5}}


class GenEvalBenchmark:
    """GenEval's six tasks over ShapeWorld's held-out prompts, judged by its detector.

    Metrics, each 0..1: every task (the prompts' ``tag``; "all" for prompts without one), their mean ``GenEval``, and
    the mean ``soft score`` over images. A task counts the same however many prompts it has. The first scorer that
    gives a verdict for an image is its judge; an image without one counts in no metric.
    """

    name = "geneval"
    headline = "GenEval"
    prompts = "package:stage_ray/shapeworld/assets/prompts/heldout.jsonl"
    rewards = (RewardConfig.model_validate(JUDGE),)
    images_per_prompt = 4

    def aggregate(self, prompts: Sequence[Prompt], scored: Sequence[ScoredGroup]) -> dict[str, MetricValue]:
        """Tasks in the order of the prompts, then the two means."""
        strict: dict[str, dict[int, list[float]]] = {}  # task -> prompt -> verdicts of its images
        soft: dict[int, list[float]] = {}
        for prompt, group in zip(prompts, scored, strict=True):
            tag = prompt.record.get("tag")
            task = strict.setdefault(tag if isinstance(tag, str) and not is_nothing(tag) else "all", {})
            for details in group.details:
                # What the first scorer with a verdict said of the image; None where every scorer failed.
                judged = next((said for said in details.values() if "verdict" in said), None)
                if judged is not None:
                    task.setdefault(prompt.index, []).append(float(judged["verdict"]))
                    if judged.get("soft") is not None:
                        soft.setdefault(prompt.index, []).append(float(judged["soft"]))
        # A task without any verdict is absent.
        tasks = {name: mean for name, by_prompt in strict.items() if (mean := mean_over_images(by_prompt))}
        metrics = {**tasks, self.headline: mean_of_metrics(tasks), "soft score": mean_over_images(soft)}
        return {name: metric for name, metric in metrics.items() if metric is not None}
