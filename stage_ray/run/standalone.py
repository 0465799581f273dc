"""One model evaluated, or drawing prompts, without a run: `stage-ray evaluate` and `generate`, and the Python API."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stage_ray.config import RewardConfig, RunConfig
from stage_ray.config.hardware import usable_cpus
from stage_ray.config.load import validate_config
from stage_ray.config.paths import require_lasting
from stage_ray.engines.vllm.environment import require_fitting_build
from stage_ray.errors import ConfigError, RunError
from stage_ray.evaluation.base import EvaluationResult, find_benchmark, summarise, write_png, write_result
from stage_ray.evaluation.loop import JudgedGroup, conditions, requests_for
from stage_ray.evaluation.partial import PartialResult
from stage_ray.files import name_disk_errors, require_writable
from stage_ray.observability.progress import Progress
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.policies import policy_class
from stage_ray.records import Prompt, RolloutRequest
from stage_ray.report.samples import contact_sheet
from stage_ray.rewards import check_rewards
from stage_ray.run.inference import inputs_of, judge
from stage_ray.run.preflight import SHOWN, drawable_prompts
from stage_ray.samplers import resolve_samplers

IMAGES_PER_BATCH = 64  # drawn at once, where as many are asked for
SHEET_IMAGES = 120  # more make a picture that no viewer likes
GO_ON = "go on with the same command"
NO_REWARD = RewardConfig(type="none")  # where nothing is scored


def evaluate(
    model: str | Path,
    suite: str = "shapeworld",
    *,
    prompts: str | Path | None = None,
    images_per_prompt: int | None = None,
    engine: str | None = None,
    guidance: float = 3.0,
    seed: int = 20,
    overrides: Sequence[str] | None = None,
    address: str | None = None,
    workers: int | None = None,
    json_file: str | Path | None = None,
    pictures: str | Path | None = None,
) -> EvaluationResult:
    """Draw held-out prompts with a model and score the pictures; each argument is an option of `stage-ray evaluate`.

    Returns:
        Metrics by name, and every image's scores; ``headline_value`` is None where no image could be judged.

    Raises:
        ConfigError: a wrong argument, by the name of the command's option; nothing was drawn.
        RunError: no prompt can be judged, or an engine, a scorer or the cluster failed.

    Example:
        evaluate("runs/stage_shapeworld/final", images_per_prompt=1).metrics["GenEval"].value
    """
    file = None if json_file is None else Path(json_file)
    require_lasting(file, "--json")
    if file is not None:
        if file.is_dir():
            raise ConfigError(f"--json {file} is a directory; name a file in it")
        require_writable(file.parent, "--json")
    shown = None if pictures is None else Path(pictures)
    require_lasting(shown, "--pictures")
    if shown is not None:
        require_writable(shown, "--pictures")
    benchmark = find_benchmark(suite, "--suite")
    images = benchmark.images_per_prompt if images_per_prompt is None else images_per_prompt
    asked = benchmark.load(str(prompts or benchmark.prompts), load_prompts)
    rewards = [reward.model_dump() for reward in benchmark.rewards]
    run = _run(model, engine, guidance, address, workers, overrides, images=images * len(asked), rewards=rewards)
    _require_judgeable(run, asked)
    asked = drawable_prompts(run, policy_class(run.policy).check(run.policy), asked)
    partial, go_on = PartialResult(), "nothing is kept without --json FILE"
    if file is not None:
        inputs = inputs_of(run, asked, {"--images-per-prompt": images, "--seed": seed})
        partial, go_on = PartialResult(file.with_name(f"{file.name}.partial"), inputs), GO_ON
    requests = requests_for(asked, images, seed)
    if shown is not None:
        if not partial.groups and shown.exists() and any(shown.iterdir()):
            raise ConfigError(f"--pictures {shown} is not empty; name another directory")
        drawn = {request.group_id for request in requests if benchmark.has_pictures(shown, request.prompt, images)}
        partial.groups = {number: group for number, group in partial.groups.items() if number in drawn}

    def save(group: JudgedGroup) -> None:
        assert shown is not None and group.images is not None, "they are asked for"
        benchmark.save_pictures(shown, group.request.prompt, group.images)

    with name_disk_errors(file or Path(), go_on), Progress() as progress:
        use = None if shown is None else save
        scored = judge(run, requests, partial, progress, title=suite, go_on=go_on, use=use)
        result = summarise(benchmark, asked, scored)
        result = replace(result, conditions=conditions(run, benchmark, requests, seed))
        if file is not None:
            write_result(file, result)
        partial.remove()
    return result


def generate(
    model: str | Path,
    prompt: str | Sequence[str],
    out: str | Path,
    *,
    prompts: str | Path | None = None,
    images: int = 4,
    engine: str | None = None,
    guidance: float = 3.0,
    seed: int = 20,
    overrides: Sequence[str] | None = None,
    address: str | None = None,
    workers: int | None = None,
) -> list[Path]:
    """Draw texts, and those of a file ``prompts``, into ``out``; each argument is an option of `stage-ray generate`.

    Returns:
        The PNGs, ``images`` of each prompt in order; beside them lies ``sheet.png`` with all of them.

    Raises:
        ConfigError: a wrong argument, by the name of the command's option; nothing was drawn.
        RunError: the engine or the cluster failed; the same call goes on after the PNGs that are there.

    Example:
        generate("runs/stage_shapeworld/final", "a photo of a red ring", "pictures", images=1)
    """
    out = Path(out)
    require_lasting(out, "--out")
    found = [Prompt(0, text, {"prompt": text}) for text in ([prompt] if isinstance(prompt, str) else prompt)]
    found += load_prompts(str(prompts)) if prompts is not None else []
    asked = [replace(one, index=index) for index, one in enumerate(found)]  # a file's own numbers begin at 0 too
    if not asked or any(not one.text.strip() for one in asked):
        raise ConfigError('there is nothing to draw; give --prompt "a photo of ..." or --prompts FILE')
    kept = out / "partial.jsonl"  # while it is there, the directory is drawn in part
    if out.exists() and not (out.is_dir() and (kept.is_file() or not any(out.iterdir()))):
        raise ConfigError(f"--out {out} exists and is not an empty directory; name another")
    require_writable(out, "--out")
    run = _run(model, engine, guidance, address, workers, overrides, images=images * len(asked))
    scoring = run.rollout.search is not None  # which then chooses by scores
    if scoring:
        _require_judgeable(run, asked)
    asked = drawable_prompts(run, policy_class(run.policy).check(run.policy), asked)
    partial = PartialResult(kept, inputs_of(run, asked, {"--images": images, "--seed": seed}, scoring=scoring))
    requests = requests_for(asked, images, seed)
    for request in requests:
        if not all(file.is_file() for file in _pictures(out, request)):
            partial.groups.pop(request.group_id, None)

    def save(group: JudgedGroup) -> None:
        assert group.images is not None, "they are asked for"
        for image, file in zip(group.images, _pictures(out, group.request), strict=True):
            write_png(file, image)

    with name_disk_errors(out, GO_ON), Progress() as progress:
        judge(run, requests, partial, progress, title="drawing", go_on=GO_ON, scoring=scoring, use=save)
        _write_sheet(out, requests)
        partial.remove()
        progress.note(f"contact sheet: {out / 'sheet.png'}")
    return [file for request in requests for file in _pictures(out, request)]


def _run(
    model: str | Path,
    engine: str | None,
    guidance: float,
    address: str | None,
    workers: int | None,
    overrides: Sequence[str] | None,
    *,
    images: int,
    rewards: list[dict[str, Any]] | None = None,
) -> RunConfig:
    """The config of a run that only draws (and scores) ``images``, on a GPU where there is one, `--set` applied."""
    import torch  # late, as in the rest of this room

    if images < 1:
        raise ConfigError(f"{images} images are asked for; ask for one of each prompt at least")
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
        "policy": {"path": str(Path(model).absolute() if Path(model).exists() else model)},
        "prompts": {"train": "-"},  # those of the command line are drawn
        "rewards": rewards or [NO_REWARD.model_dump()],
        "evaluation": {"enabled": False},
        "rollout": rollout,
        "cluster": {"address": address},
    }
    run = validate_config(data, overrides, source="--set")
    resolve_samplers(run)  # a wrong option is said before anything starts
    if run.rollout.search is not None and run.rewards == [NO_REWARD]:
        raise ConfigError(f"rollout.search = {run.rollout.search!r} chooses by a scorer; name one in rewards")
    if run.cluster.address is None:  # else vLLM runs elsewhere
        require_fitting_build(run.rollout)
    return run


def _require_judgeable(run: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Say which prompts the scorers cannot judge, the first of them; a RunError where they can judge none."""
    unjudged = check_rewards(run.rewards, prompts)
    for prompt, why in unjudged[:SHOWN]:
        print(f"{prompt.where}: {why}", file=sys.stderr)
    if len({prompt.index for prompt, _ in unjudged}) == len(prompts):
        raise RunError(f"none of {len(prompts)} prompts can be judged, so there is nothing to measure")


def _pictures(out: Path, request: RolloutRequest) -> list[Path]:
    """The files of a group's images."""
    return [out / f"{request.prompt.index:04d}-{number}.png" for number in range(len(request.seeds))]


def _write_sheet(out: Path, requests: Sequence[RolloutRequest]) -> None:
    """The first images on one page, read back from their files: those of an earlier call are among them."""
    files = [(file, request.prompt.text) for request in requests for file in _pictures(out, request)][:SHEET_IMAGES]
    images = np.stack([np.asarray(Image.open(file)) for file, _ in files])
    contact_sheet(images, [text for _, text in files], [None] * len(files), out / "sheet.png")
