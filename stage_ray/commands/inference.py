"""``stage-ray evaluate`` and ``stage-ray generate``: one model, in this process or on the workers of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option, echo

from stage_ray.commands.train import SetOption
from stage_ray.errors import RunError

MODEL = "A Hugging Face directory (such as RUN_DIR/final), package:MODULE/DIR, or a hub id"
ModelArgument = Annotated[str, Argument(metavar="MODEL", help=MODEL)]
EngineOption = Annotated[Literal["vllm", "torch"] | None, Option(help="What draws; vllm where it is installed")]
GuidanceOption = Annotated[float, Option(help="Classifier-free guidance scale; 1 is off", min=1.0)]
SeedOption = Annotated[int, Option(help="Fixes every image", min=0)]
ADDRESS = "Draw with workers of a Ray cluster: auto, or HOST:PORT of its head. Without it, in this process"
AddressOption = Annotated[str | None, Option(metavar="ADDRESS", help=ADDRESS)]
WORKERS = "Rollout workers that share the prompts; without --address, several start a Ray on this machine"
WorkersOption = Annotated[int | None, Option(metavar="COUNT", help=WORKERS, min=1)]


def evaluate(
    model: ModelArgument,
    suite: Annotated[str, Option(help="Which benchmark")] = "shapeworld",
    prompts: Annotated[str | None, Option(metavar="FILE", help="By default the suite's; in its format")] = None,
    images_per_prompt: Annotated[int | None, Option(metavar="COUNT", help="By default the suite's", min=1)] = None,
    engine: EngineOption = None,
    guidance: GuidanceOption = 3.0,
    seed: SeedOption = 20,
    overrides: SetOption = None,
    address: AddressOption = None,
    workers: WorkersOption = None,
    json_file: Annotated[Path | None, Option("--json", help="Also write the whole result here")] = None,
    pictures: Annotated[
        Path | None, Option(metavar="DIR", help="Also write the pictures here, laid out as the suite's own code has it")
    ] = None,
) -> None:
    """Draw held-out prompts with a model and score the pictures.

    With --json FILE the verdicts are kept in FILE.partial as they come. If the command is stopped, the same one again
    goes on there.

    Example: stage-ray evaluate runs/stage_shapeworld/final --suite shapeworld --json after.json
    """
    from stage_ray.run import standalone

    result = standalone.evaluate(
        model,
        suite,
        prompts=prompts,
        images_per_prompt=images_per_prompt,
        engine=engine,
        guidance=guidance,
        seed=seed,
        overrides=overrides,
        address=address,
        workers=workers,
        json_file=json_file,
        pictures=pictures,
    )
    width = max(map(len, result.metrics), default=0)
    for name, metric in result.metrics.items():
        echo(f"{name:<{width}}  {metric}  ({metric.images} images)")
    headline = result.metrics.get(result.headline)
    if left_out := len(result.images) - (headline.images if headline else 0):
        echo(f"{left_out} images could not be judged and count in no score")
    if headline is None:
        raise RunError(f"no image could be judged, so there is no {result.headline}")


def generate(
    model: ModelArgument,
    out: Annotated[Path, Option(help="Directory for the PNGs and the contact sheet; new, empty, or drawn in part")],
    prompt: Annotated[list[str] | None, Option(metavar="TEXT", help="A prompt; may be repeated")] = None,
    prompts: Annotated[str | None, Option(metavar="FILE", help="Prompts, one a line, or JSON Lines")] = None,
    images: Annotated[int, Option(help="Images of each prompt", min=1)] = 4,
    engine: EngineOption = None,
    guidance: GuidanceOption = 3.0,
    seed: SeedOption = 20,
    overrides: SetOption = None,
    address: AddressOption = None,
    workers: WorkersOption = None,
) -> None:
    """Draw prompts: one PNG per image, and a contact sheet of all.

    If the command is stopped, the same one again goes on after the PNGs that are there.

    Example: stage-ray generate runs/stage_shapeworld/final --prompt "a photo of a red ring" --out pictures
    """
    from stage_ray.run import standalone

    standalone.generate(
        model,
        prompt or [],
        out,
        prompts=prompts,
        images=images,
        engine=engine,
        guidance=guidance,
        seed=seed,
        overrides=overrides,
        address=address,
        workers=workers,
    )
