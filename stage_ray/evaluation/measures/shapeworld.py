"""The `features` measure for ShapeWorld: by its own small network, against renders of the prompts."""

from __future__ import annotations

from stage_ray.evaluation.measures.features import FeaturesMeasure


class ShapeWorldMeasure(FeaturesMeasure):
    """As `FeaturesMeasure`; each image's reference picture is a fresh render of a scene that its prompt asks for."""

    options = {
        "path": "package:stage_ray/shapeworld/assets/features",
        "reference": "stage_ray.shapeworld.reference.draw_prompt",
    }
