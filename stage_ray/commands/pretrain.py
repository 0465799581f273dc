"""``stage-ray pretrain``: rebuild ShapeWorld, the models and prompts that ship with the package."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Option


class PretrainStage(StrEnum):
    """The stages of ``pretrain``, named here because importing them takes seconds."""

    prompts = "prompts"
    tokenizer = "tokenizer"
    language_model = "language-model"
    detector = "detector"
    clip = "clip"
    cards = "cards"


def pretrain(
    out: Annotated[Path, Option(help="Directory of the results; a run that was cut off goes on in it")],
    stages: Annotated[list[PretrainStage] | None, Option("--stage", help="This stage alone; may be repeated")] = None,
    seed: Annotated[int, Option(help="Fixes the pictures and the weights at the start", min=0)] = 0,
    smoke: Annotated[
        bool, Option("--smoke", help="A few steps each, to see that it works; models are useless")
    ] = False,
) -> None:
    """Rebuild what ships with the package: prompts, tokenizer, policy, detector, CLIP. About 75 minutes on two cores.

    Example: stage-ray pretrain --out world --smoke
    """
    from stage_ray.shapeworld.pretrain import pretrain as pretrain_world

    pretrain_world(out, stages=stages, seed=seed, smoke=smoke)
