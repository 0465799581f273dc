"""The detector's model card: how it was made and how good it is, in the numbers of `detector_exam.examine`."""

from __future__ import annotations

from collections.abc import Mapping

TEMPLATE = """---
license: apache-2.0
library_name: stage_ray
---
# ShapeWorld's detector

Names the shape of one coloured region: a convolutional network of 24 thousand parameters over 24 x 24 pixels of opacity
(no colour), with the classes {classes}. The regions, their colours, boxes and masks come from plain image
processing (`stage_ray/shapeworld/detector_segmentation.py`), which needs no weights.

Made by `stage_ray.shapeworld.detector_training.train` (stage `detector` of `stage-ray pretrain`), {source}, and on
wrong objects that must count as "none": turned, squeezed, cut, bitten, merged, half-way between two shapes, wobbly,
blobs, smears. Seed {seed}, {steps} updates of {batch} regions.

## How good it is

Share of GenEval verdicts that are right, over prompts of all six tasks, half of them wrong by one shape, colour, number
or place; confidence above {threshold}.

| pictures | all | true prompts | wrong prompts |
|---|---|---|---|
{verdicts}

Share of pictures without a clear object in which it still sees one:

| mush | share |
|---|---|
{mush}
"""

MUSH_KINDS = {
    "noise": "smooth coloured noise",
    "blend": "two scenes at half strength each",
    "tokens": "decoded from random tokens",
    "shuffled": "a scene with half of its tokens in each other's places (an object may well survive that)",
}


def model_card(report: Mapping[str, Mapping[str, float]], **facts: object) -> str:
    """The card's Markdown, from `examine`'s report and the facts that TEMPLATE names."""
    verdicts = [
        f"| {name} | {grades['right']:.3f} | {grades['right_true']:.3f} | {grades['right_wrong']:.3f} |"
        for name, grades in report.items()
        if name != "mush"
    ]
    non_objects = [f"| {MUSH_KINDS[kind]} | {share:.3f} |" for kind, share in report["mush"].items()]
    return TEMPLATE.format(verdicts="\n".join(verdicts), non_objects="\n".join(non_objects), **facts)
