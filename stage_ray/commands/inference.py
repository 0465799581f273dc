"""``stage-ray evaluate`` and ``stage-ray generate``: one model in this process, no Ray."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option, echo

from stage_ray.config.paths import require_lasting
from stage_ray.engines.vllm.environment import require_fitting_build
from stage_ray.errors import ConfigError, RunError

if TYPE_CHECKING:
    import numpy as np

    from stage_ray.config import RunConfig
    from stage_ray.engines.base import ImageEngine
    from stage_ray.evaluation.loop import JudgedGroup
    from stage_ray.observability.progress import Progress

MODEL = "A Hugging Face directory (such as RUN_DIR/final), package:MODULE/DIR, or a hub id"
ModelArgument = Annotated[str, Argument(metavar="MODEL", help=MODEL)]
EngineOption = Annotated[Literal["vllm", "torch"] | None, Option(help="What draws; vllm where it is installed")]
GuidanceOption = Annotated[float, Option(help="Classifier-free guidance scale; 1 is off", min=1.0)]
SetOption = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="A key of train's configs: rollout.gpus=1, policy.template=paper, ..."),
]
SeedOption = Annotated[int, Option(help="Fixes every image", min=0)]
IMAGES_PER_BATCH = 64  # drawn at once, where the command asks for as many
SHEET_IMAGES = 120  # more make a picture that no viewer likes


def evaluate(
    model: ModelArgument,
    suite: Annotated[str, Option(help="Which benchmark")] = "geneval",
    prompts: Annotated[str | None, Option(metavar="FILE", help="By default the suite's; in its format")] = None,
    images_per_prompt: Annotated[int | None, Option(metavar="COUNT", help="By default the suite's", min=1)] = None,
    engine: EngineOption = None,
    guidance: GuidanceOption = 3.0,
    seed: SeedOption = 20,
    overrides: SetOption = None,
    json_file: Annotated[Path | None, Option("--json", help="Also write the whole result here")] = None,
) -> None:
    """Draw held-out prompts with a model and score the pictures.

    Example: stage-ray evaluate runs/stage_shapeworld/final --suite geneval --json after.json
    """
    from stage_ray.evaluation.base import find_benchmark, write_result
    from stage_ray.evaluation.loop import EngineBackend, conditions, requests_for
    from stage_ray.evaluation.loop import evaluate as run_benchmark
    from stage_ray.observability.progress import Progress
    from stage_ray.pipeline.prompt_files import load_prompts
    from stage_ray.policies import policy_class
    from stage_ray.rewards import build_rewards, check_rewards
    from stage_ray.run.preflight import SHOWN, drawable_prompts

    require_lasting(json_file, "--json")
    benchmark = find_benchmark(suite, "--suite")
    images = images_per_prompt or benchmark.images_per_prompt
    asked = load_prompts(prompts or benchmark.prompts)
    rewards = [reward.model_dump() for reward in benchmark.rewards]
    run = _run(model, engine, guidance, overrides, images=images * len(asked), rewards=rewards)
    unjudged = check_rewards(run.rewards, asked)
    for prompt, why in unjudged[:SHOWN]:
        echo(f"{prompt.where}: {why}", err=True)
    if len({prompt.index for prompt, _ in unjudged}) == len(asked):
        raise RunError(f"none of {len(asked)} prompts can be judged, so there is nothing to measure")
    asked = drawable_prompts(run, policy_class(run.policy).check(run.policy), asked)
    scorers = build_rewards(run.rewards)
    with (
        Progress() as progress,
        _engine(run, progress) as loaded,
        progress.bar(suite, total=len(asked)) as advance,
    ):
        backend = EngineBackend(loaded, scorers)
        requests = requests_for(asked, images, seed)
        result = asyncio.run(run_benchmark(backend, benchmark, requests, advance))
    if json_file is not None:
        write_result(json_file, replace(result, conditions=conditions(run, benchmark, requests, seed)))
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
    out: Annotated[Path, Option(help="Directory for the PNGs and the contact sheet; must be new or empty")],
    prompt: Annotated[list[str] | None, Option(metavar="TEXT", help="A prompt; may be repeated")] = None,
    prompts: Annotated[str | None, Option(metavar="FILE", help="Prompts, one a line, or JSON Lines")] = None,
    images: Annotated[int, Option(help="Images of each prompt", min=1)] = 4,
    engine: EngineOption = None,
    guidance: GuidanceOption = 3.0,
    seed: SeedOption = 20,
    overrides: SetOption = None,
) -> None:
    """Draw prompts: one PNG per image, and a contact sheet of all.

    Example: stage-ray generate runs/stage_shapeworld/final --prompt "a photo of a red ring" --out pictures
    """
    import numpy as np
    from PIL import Image

    from stage_ray.evaluation.loop import EngineBackend, judge_in_batches, requests_for
    from stage_ray.observability.progress import Progress
    from stage_ray.pipeline.prompt_files import load_prompts
    from stage_ray.policies import policy_class
    from stage_ray.records import Prompt
    from stage_ray.report.samples import contact_sheet
    from stage_ray.run.preflight import drawable_prompts

    require_lasting(out, "--out")
    found = [Prompt(0, text, {"prompt": text}) for text in prompt or []]
    found += load_prompts(prompts) if prompts is not None else []
    asked = [replace(one, index=index) for index, one in enumerate(found)]  # a file's own numbers begin at 0 too
    if not asked or any(not one.text.strip() for one in asked):
        raise ConfigError('there is nothing to draw; give --prompt "a photo of ..." or --prompts FILE')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not an empty directory; name another")
    run = _run(model, engine, guidance, overrides, images=images * len(asked))
    asked = drawable_prompts(run, policy_class(run.policy).check(run.policy), asked)
    sheet: list[tuple[np.ndarray, str]] = []

    def save(group: JudgedGroup) -> None:
        for number, image in enumerate(group.images if group.images is not None else ()):
            Image.fromarray(image).save(out / f"{group.request.prompt.index:04d}-{number}.png")
            if len(sheet) < SHEET_IMAGES:
                sheet.append((image, group.request.prompt.text))

    with (
        Progress() as progress,
        _engine(run, progress) as loaded,
        progress.bar("drawing", total=len(asked)) as advance,
    ):
        out.mkdir(parents=True, exist_ok=True)
        requests = requests_for(asked, images, seed)
        asyncio.run(judge_in_batches(EngineBackend(loaded), requests, save, images=True, advance=advance))
        drawn, captions = zip(*sheet, strict=True)
        contact_sheet(np.stack(drawn), captions, [None] * len(sheet), out / "sheet.png")
        progress.note(f"contact sheet: {out / 'sheet.png'}")


def _run(
    model: str,
    engine: str | None,
    guidance: float,
    overrides: list[str] | None,
    *,
    images: int,
    rewards: list[dict[str, Any]] | None = None,
) -> RunConfig:
    """The config of a run that only draws (and scores) ``images``, on a GPU where there is one, `--set` applied."""
    import torch

    from stage_ray.config.hardware import usable_cpus
    from stage_ray.config.load import build_config

    rollout = {
        "engine": engine or ("vllm" if importlib.util.find_spec("vllm") else "torch"),
        "guidance_scale": guidance,
        "cpus": usable_cpus(),
        "gpus": min(1, torch.cuda.device_count()),
        "gpu_memory_utilization": 0.85,
        "images_per_batch": min(images, IMAGES_PER_BATCH),
    }
    data = {
        "steps": 1,
        "policy": {"path": model},
        "prompts": {"train": "-"},  # those of the command line are drawn
        "rewards": rewards or [{"type": "none"}],
        "evaluation": {"enabled": False},
        "rollout": rollout,
    }
    run = build_config(data, overrides, source="--set")
    require_fitting_build(run.rollout)
    return run


@contextmanager
def _engine(run: RunConfig, progress: Progress) -> Iterator[ImageEngine]:
    """The engine of a model in this process; closed at the end."""
    import transformers

    from stage_ray.engines import build_engine

    transformers.utils.logging.disable_progress_bar()
    progress.stage(f"loading {run.policy.path} into the {run.rollout.engine} engine")
    engine = build_engine(run.policy, run.rollout, worker="local")
    try:
        yield engine
    finally:
        engine.close()
