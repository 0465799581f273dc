"""``stage-ray evaluate`` and ``stage-ray generate``: one model, in this process or on the workers of a Ray cluster."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option, echo

from stage_ray.commands.train import SetOption
from stage_ray.config.paths import require_lasting
from stage_ray.engines.vllm.environment import require_fitting_build
from stage_ray.errors import ConfigError, RunError
from stage_ray.files import name_disk_errors, require_writable

if TYPE_CHECKING:
    import numpy as np

    from stage_ray.config import RunConfig
    from stage_ray.evaluation.loop import JudgedGroup
    from stage_ray.records import Prompt, RolloutRequest

MODEL = "A Hugging Face directory (such as RUN_DIR/final), package:MODULE/DIR, or a hub id"
ModelArgument = Annotated[str, Argument(metavar="MODEL", help=MODEL)]
EngineOption = Annotated[Literal["vllm", "torch"] | None, Option(help="What draws; vllm where it is installed")]
GuidanceOption = Annotated[float, Option(help="Classifier-free guidance scale; 1 is off", min=1.0)]
SeedOption = Annotated[int, Option(help="Fixes every image", min=0)]
ADDRESS = "Draw with workers of a Ray cluster: auto, or HOST:PORT of its head. Without it, in this process"
AddressOption = Annotated[str | None, Option(metavar="ADDRESS", help=ADDRESS)]
WORKERS = "Rollout workers that share the prompts; without --address, several start a Ray on this machine"
WorkersOption = Annotated[int | None, Option(metavar="COUNT", help=WORKERS, min=1)]
IMAGES_PER_BATCH = 64  # drawn at once, where the command asks for as many
SHEET_IMAGES = 120  # more make a picture that no viewer likes
GO_ON = "go on with the same command"


def evaluate(
    model: ModelArgument,
    suite: Annotated[str, Option(help="Which benchmark")] = "geneval",
    prompts: Annotated[str | None, Option(metavar="FILE", help="By default the suite's; in its format")] = None,
    images_per_prompt: Annotated[int | None, Option(metavar="COUNT", help="By default the suite's", min=1)] = None,
    engine: EngineOption = None,
    guidance: GuidanceOption = 3.0,
    seed: SeedOption = 20,
    overrides: SetOption = None,
    address: AddressOption = None,
    workers: WorkersOption = None,
    json_file: Annotated[Path | None, Option("--json", help="Also write the whole result here")] = None,
) -> None:
    """Draw held-out prompts with a model and score the pictures.

    With --json FILE the verdicts are kept in FILE.partial as they come. If the command is stopped, the same one again
    goes on there.

    Example: stage-ray evaluate runs/stage_shapeworld/final --suite geneval --json after.json
    """
    from stage_ray.evaluation.base import find_benchmark, summarise, write_result
    from stage_ray.evaluation.loop import conditions, requests_for
    from stage_ray.evaluation.partial import PartialResult
    from stage_ray.observability.progress import Progress
    from stage_ray.pipeline.prompt_files import load_prompts
    from stage_ray.policies import policy_class
    from stage_ray.run.inference import inputs_of, judge
    from stage_ray.run.preflight import drawable_prompts

    require_lasting(json_file, "--json")
    if json_file is not None:
        if json_file.is_dir():
            raise ConfigError(f"--json {json_file} is a directory; name a file in it")
        require_writable(json_file.parent, "--json")
    benchmark = find_benchmark(suite, "--suite")
    images = images_per_prompt or benchmark.images_per_prompt
    asked = load_prompts(prompts or benchmark.prompts)
    rewards = [reward.model_dump() for reward in benchmark.rewards]
    run = _run(model, engine, guidance, address, workers, overrides, images=images * len(asked), rewards=rewards)
    _require_judgeable(run, asked)
    asked = drawable_prompts(run, policy_class(run.policy).check(run.policy), asked)
    partial, go_on = PartialResult(), "nothing is kept without --json FILE"
    if json_file is not None:
        inputs = inputs_of(run, asked, {"--images-per-prompt": images, "--seed": seed})
        partial, go_on = PartialResult(json_file.with_name(f"{json_file.name}.partial"), inputs), GO_ON
    requests = requests_for(asked, images, seed)
    with name_disk_errors(json_file or Path(), go_on), Progress() as progress:
        result = summarise(benchmark, asked, judge(run, requests, partial, progress, title=suite, go_on=go_on))
        if json_file is not None:
            write_result(json_file, replace(result, conditions=conditions(run, benchmark, requests, seed)))
        partial.remove()
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
    from stage_ray.evaluation.loop import requests_for
    from stage_ray.evaluation.partial import PartialResult
    from stage_ray.observability.progress import Progress
    from stage_ray.pipeline.prompt_files import load_prompts
    from stage_ray.policies import policy_class
    from stage_ray.records import Prompt
    from stage_ray.run.inference import inputs_of, judge
    from stage_ray.run.preflight import drawable_prompts

    require_lasting(out, "--out")
    found = [Prompt(0, text, {"prompt": text}) for text in prompt or []]
    found += load_prompts(prompts) if prompts is not None else []
    asked = [replace(one, index=index) for index, one in enumerate(found)]  # a file's own numbers begin at 0 too
    if not asked or any(not one.text.strip() for one in asked):
        raise ConfigError('there is nothing to draw; give --prompt "a photo of ..." or --prompts FILE')
    kept = out / "partial.jsonl"  # while it is there, the directory is drawn in part
    if out.exists() and not (out.is_dir() and (kept.is_file() or not any(out.iterdir()))):
        raise ConfigError(f"--out {out} exists and is not an empty directory; name another")
    require_writable(out, "--out")
    run = _run(model, engine, guidance, address, workers, overrides, images=images * len(asked))
    asked = drawable_prompts(run, policy_class(run.policy).check(run.policy), asked)
    partial = PartialResult(kept, inputs_of(run, asked, {"--images": images, "--seed": seed}, scoring=False))
    requests = requests_for(asked, images, seed)
    for request in requests:
        if not all(file.is_file() for file in _pictures(out, request)):
            partial.groups.pop(request.group_id, None)

    def save(group: JudgedGroup) -> None:
        out.mkdir(parents=True, exist_ok=True)
        assert group.images is not None, "they are asked for"
        for image, file in zip(group.images, _pictures(out, group.request), strict=True):
            _write_png(image, file)

    with name_disk_errors(out, GO_ON), Progress() as progress:
        judge(run, requests, partial, progress, title="drawing", go_on=GO_ON, scoring=False, use=save)
        _write_sheet(out, requests)
        partial.remove()
        progress.note(f"contact sheet: {out / 'sheet.png'}")


def _run(
    model: str,
    engine: str | None,
    guidance: float,
    address: str | None,
    workers: int | None,
    overrides: list[str] | None,
    *,
    images: int,
    rewards: list[dict[str, Any]] | None = None,
) -> RunConfig:
    """The config of a run that only draws (and scores) ``images``, on a GPU where there is one, `--set` applied."""
    import torch

    from stage_ray.config.hardware import usable_cpus
    from stage_ray.config.load import build_config
    from stage_ray.samplers import load_rule

    workers = workers or 1
    rollout: dict[str, Any] = {
        "engine": engine or ("vllm" if importlib.util.find_spec("vllm") else "torch"),
        "guidance_scale": guidance,
        "workers": workers,
        "gpus": min(1, torch.cuda.device_count()),
        "gpu_memory_utilization": 0.85,
        "images_per_batch": min(math.ceil(images / workers), IMAGES_PER_BATCH),  # one for every worker at least
    }
    if address is None:  # all of this machine, shared by the workers; a cluster's nodes are not known here
        rollout["cpus"] = rollout["threads"] = max(1, usable_cpus() // workers)
    data = {
        "steps": 1,
        # A cluster's workers are not where this command was given.
        "policy": {"path": str(Path(model).absolute()) if Path(model).exists() else model},
        "prompts": {"train": "-"},  # those of the command line are drawn
        "rewards": rewards or [{"type": "none"}],
        "evaluation": {"enabled": False},
        "rollout": rollout,
        "cluster": {"address": address},
    }
    run = build_config(data, overrides, source="--set")
    load_rule(run.rollout)  # a wrong option is said before anything starts
    if run.cluster.address is None:  # else vLLM runs elsewhere
        require_fitting_build(run.rollout)
    return run


def _require_judgeable(run: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Say which prompts the scorers cannot judge, the first of them; a RunError where they can judge none."""
    from stage_ray.rewards import check_rewards
    from stage_ray.run.preflight import SHOWN

    unjudged = check_rewards(run.rewards, prompts)
    for prompt, why in unjudged[:SHOWN]:
        echo(f"{prompt.where}: {why}", err=True)
    if len({prompt.index for prompt, _ in unjudged}) == len(prompts):
        raise RunError(f"none of {len(prompts)} prompts can be judged, so there is nothing to measure")


def _pictures(out: Path, request: RolloutRequest) -> list[Path]:
    """The files of a group's images."""
    return [out / f"{request.prompt.index:04d}-{number}.png" for number in range(len(request.seeds))]


def _write_png(image: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W, 3], whole or not at all."""
    from PIL import Image

    scratch = path.with_name(path.name + ".tmp")
    Image.fromarray(image).save(scratch, format="PNG")
    scratch.replace(path)


def _write_sheet(out: Path, requests: Sequence[RolloutRequest]) -> None:
    """The first images on one page, read back from their files: those of an earlier call are among them."""
    import numpy as np
    from PIL import Image

    from stage_ray.report.samples import contact_sheet

    files = [(file, request.prompt.text) for request in requests for file in _pictures(out, request)][:SHEET_IMAGES]
    images = np.stack([np.asarray(Image.open(file)) for file, _ in files])
    contact_sheet(images, [text for _, text in files], [None] * len(files), out / "sheet.png")
