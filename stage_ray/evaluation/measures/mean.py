"""The mean of any scorer, such as CLIP's for how well pictures fit their texts."""

from __future__ import annotations

from collections.abc import Sequence

from stage_ray.evaluation.measures.base import Measure
from stage_ray.evaluation.metrics import MetricValue, mean_over_images
from stage_ray.records import Prompt, ScoredGroup


class MeanMeasure(Measure):
    """The mean over images of the scorer that the config names, under its ``name``; more is better."""

    def aggregate(self, prompts: Sequence[Prompt], groups: Sequence[ScoredGroup]) -> dict[str, MetricValue]:
        """As `Measure.aggregate`."""
        by_prompt: dict[int, list[float]] = {}
        for prompt, group in zip(prompts, groups, strict=True):
            if (scores := group.scores[group.valid]).size:
                by_prompt[prompt.index] = scores.astype(float).tolist()
        mean = mean_over_images(by_prompt, better="larger")
        return {groups[0].names[0]: mean} if mean else {}
