"""``stage-ray generate``: draw prompts with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stage_ray.commands.options import EngineOption, GuidanceOption, ModelArgument, SeedOption


def generate(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Directory for the PNGs and the contact sheet; must be new or empty")],
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be repeated")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file of prompts, one a line, or JSON Lines")
    ] = None,
    images: Annotated[int, typer.Option(help="Images of each prompt", min=1)] = 4,
    engine: EngineOption = None,
    guidance: GuidanceOption = 3.0,
    seed: SeedOption = 20,
) -> None:
    """Draw prompts: one PNG per image, and a contact sheet of all.

    Example: stage-ray generate runs/stage_shapeworld/final --prompt "a photo of a red ring" --out pictures
    """
    from stage_ray.commands.inference import generate_images
    from stage_ray.observability.progress import Progress

    with Progress() as progress:
        sheet = generate_images(
            model,
            texts=prompt or [],
            prompts=prompts,
            out=out,
            engine=engine,
            images_per_prompt=images,
            guidance=guidance,
            seed=seed,
            progress=progress,
        )
        progress.note(f"contact sheet: {sheet}")
