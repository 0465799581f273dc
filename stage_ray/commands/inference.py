"""``stage-ray evaluate`` and ``stage-ray generate``: one model, in this process or on the workers of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option, echo

from stage_ray.commands.train import SetOption
from stage_ray.errors import RunError

if TYPE_CHECKING:
    from stage_ray.inference.evaluate import Comparison

MODEL = "A Hugging Face directory (such as RUN_DIR/final), package:MODULE/DIR, or a hub id"
ModelArgument = Annotated[str, Argument(metavar="MODEL", help=MODEL)]
EngineOption = Annotated[Literal["vllm", "torch"] | None, Option(help="What draws; vllm where it is installed")]
GuidanceOption = Annotated[float, Option(help="Classifier-free guidance scale; 1 is off", min=1.0)]
SeedOption = Annotated[int, Option(help="Fixes every image", min=0)]
ADDRESS = "Draw with workers of a Ray cluster: auto, or HOST:PORT of its head. Without it, in this process"
AddressOption = Annotated[str | None, Option(metavar="ADDRESS", help=ADDRESS)]
COPY = "A copy of a suite's prompts in its format, where it ships none or others are wanted; a path or hf://"
JUDGE = "The model behind an OpenAI-compatible endpoint that answers the questions of dpg, geneval2, unigenbench, wise"
MEASURE = "Beside the suites: shapeworld, features, clean, drift (with --against), or package.module.Class; repeatable"
WORKERS = "Rollout workers that share the prompts; without --address, several start a Ray on this machine"
WorkersOption = Annotated[int | None, Option(metavar="COUNT", help=WORKERS, min=1)]


def evaluate(
    model: ModelArgument,
    suite: Annotated[
        str, Option(metavar="NAME[,NAME]", help="Which benchmarks; README of stage_ray/evaluation lists them")
    ] = "shapeworld",
    against: Annotated[str | None, Option(metavar="BASE", help="Another model, for the differences to it")] = None,
    prompts: Annotated[list[str] | None, Option(metavar="[SUITE=]COPY", help=COPY)] = None,
    judge: Annotated[str | None, Option(metavar="MODEL@URL", help=JUDGE)] = None,
    measure: Annotated[list[str] | None, Option(metavar="NAME", help=MEASURE)] = None,
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
    goes on there. With --against another model draws the same prompts with the same seeds, and the differences are
    paired. The pictures of --pictures are MODEL's.

    Example: stage-ray evaluate runs/stage_shapeworld/final --suite shapeworld --json after.json
    """
    from stage_ray.inference.evaluate import evaluate_suites

    suites = [name.strip() for name in suite.split(",")]
    places = dict(place.split("=", 1) for place in prompts or () if "=" in place)
    results = evaluate_suites(
        model,
        suites,
        against=against,
        prompts=places or (prompts[-1] if prompts else None),
        judge_by=judge,
        measures=measure or (),
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
    for name, found in results.items():
        if len(results) > 1:
            echo(f"\n{name}")
        _print(found)
    lacking = [one.headline for found in results.values() for one in found.of_both() if one.headline not in one.metrics]
    if lacking:
        raise RunError(f"no image could be judged, so there is no {lacking[0]}")


def _print(found: Comparison) -> None:
    """A table: each metric, and with another model that one's and the difference."""
    result, before, changes = found.result, found.against, found.changes()
    width = max(map(len, result.metrics), default=0)
    for name, metric in result.metrics.items():
        was = before.metrics.get(name) if before else None
        change = f"  against {was}, difference {changes[name].value:+.3f}" if was and name in changes else ""
        error = f" ± {changes[name].error:.3f}" if change and changes[name].error is not None else ""
        echo(f"{name:<{width}}  {metric}{change}{error}  ({metric.images} images)")
    for one in found.of_both():
        if left_out := one.unjudged:
            echo(f"{left_out} images could not be judged and count in no score")
    if result.note:
        echo(f"{result.headline}: {result.note}")


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
    from stage_ray.inference import generate as drawing

    drawing.generate(
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
