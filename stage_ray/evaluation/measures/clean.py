"""The share of ShapeWorld's pictures that show whole objects on clean paper and nothing else."""

from __future__ import annotations

from stage_ray.evaluation.measures.mean import MeanMeasure


class CleanMeasure(MeanMeasure):
    """As ShapeWorld's detector sees it, whatever the prompt asked for."""

    scorer = "stage_ray.shapeworld.clean.CleanReward"
