"""``stage-ray evaluate``: score a model on a held-out benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stage_ray.commands.options import EngineOption, GuidanceOption, ModelArgument, SeedOption


def evaluate(
    model: ModelArgument,
    suite: Annotated[str, typer.Option(help="Which benchmark")] = "geneval",
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="A prompt file in the suite's format; the suite's own by default")
    ] = None,
    images_per_prompt: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Images of each prompt; the suite's number by default", min=1)
    ] = None,
    engine: EngineOption = None,
    guidance: GuidanceOption = 3.0,
    seed: SeedOption = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the whole result here")] = None,
) -> None:
    """Draw held-out prompts with a model and score the pictures.

    Example: stage-ray evaluate runs/stage_shapeworld/final --suite geneval --json after.json
    """
    from stage_ray.commands.inference import evaluate_model, result_table, write_result
    from stage_ray.observability.progress import Progress

    with Progress() as progress:
        result = evaluate_model(
            model,
            suite=suite,
            prompts=prompts,
            engine=engine,
            images_per_prompt=images_per_prompt,
            guidance=guidance,
            seed=seed,
            progress=progress,
        )
    if json_file is not None:
        write_result(result, json_file)
    typer.echo(result_table(result))
