"""One model evaluated, or drawing prompts, without a run: `stage-ray evaluate` and `generate`, and the Python API."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stage_ray.config import RewardConfig, RunConfig
from stage_ray.config.hardware import usable_cpus
from stage_ray.config.load import validate_config
from stage_ray.config.paths import require_lasting
from stage_ray.engines.vllm.environment import require_fitting_build
from stage_ray.errors import ConfigError, RunError, suggest
from stage_ray.evaluation.base import (
    Benchmark,
    EvaluationResult,
    changes,
    find_benchmark,
    write_png,
    write_result,
)
from stage_ray.evaluation.loop import requests_for
from stage_ray.evaluation.metrics import MetricValue
from stage_ray.evaluation.partial import PartialResult
from stage_ray.evaluation.searching import check_search
from stage_ray.files import atomic_write, name_disk_errors, require_writable
from stage_ray.observability.progress import Progress
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.policies import family_of, policy_class
from stage_ray.pretrained import base_location
from stage_ray.records import JudgedGroup, Prompt, RolloutRequest
from stage_ray.report.samples import contact_sheet
from stage_ray.rewards import check_rewards
from stage_ray.run.inference import Job, inputs_of, judge
from stage_ray.run.measuring import drift_of, sum_up, with_measures
from stage_ray.run.preflight import SHOWN, drawable_prompts
from stage_ray.samplers import resolve_samplers

IMAGES_PER_BATCH = 64  # drawn at once, where as many are asked for
SHEET_IMAGES = 120  # more make a picture that no viewer likes
GO_ON = "go on with the same command"
JUDGE = "vlm_questions"  # the scorer that asks the model of --judge
NO_REWARD = RewardConfig(type="none")  # where nothing is scored


@dataclass(frozen=True, slots=True)
class Comparison:
    """A suite's results: of the model, and of the one that it is compared with, None where there is none."""

    result: EvaluationResult
    against: EvaluationResult | None = None

    def of_both(self) -> list[EvaluationResult]:
        """The results that there are."""
        return [self.result] + ([self.against] if self.against else [])

    def changes(self) -> dict[str, MetricValue]:
        """From the other model to this one, prompt by prompt; empty without another."""
        return {} if self.against is None else changes(self.against, self.result)


def evaluate(model: str | Path, suite: str = "shapeworld", **options: Any) -> EvaluationResult:
    """Draw held-out prompts with a model and score the pictures; the result of one suite and of ``model``.

    Options, what it raises: as of `evaluate_suites`; each is an option of `stage-ray evaluate`.

    Example:
        evaluate("runs/stage_shapeworld/final", images_per_prompt=1).metrics["GenEval"].value
    """
    (found,) = evaluate_suites(model, [suite], **options).values()
    return found.result


def evaluate_suites(
    model: str | Path,
    suites: Sequence[str],
    *,
    against: str | Path | None = None,
    prompts: str | Path | Mapping[str, str | Path] | None = None,
    judge_by: str | None = None,
    measures: Sequence[str] = (),
    images_per_prompt: int | None = None,
    engine: str | None = None,
    guidance: float = 3.0,
    seed: int = 20,
    overrides: Sequence[str] | None = None,
    address: str | None = None,
    workers: int | None = None,
    json_file: str | Path | None = None,
    pictures: str | Path | None = None,
) -> dict[str, Comparison]:
    """Draw the prompts of benchmarks with a model, and with another, and score the pictures.

    Each argument is an option of `stage-ray evaluate`; ``prompts`` of several suites are by suite.

    Returns:
        By suite metrics by name, and every image's scores; ``headline_value`` is None where no image could be judged.

    Raises:
        ConfigError: a wrong argument, by the name of the command's option; nothing was drawn.
        RunError: no prompt can be judged, or an engine, a scorer or the cluster failed.

    Example:
        evaluate_suites(model, ["geneval", "hpsv2"], against=base, prompts={"hpsv2": copy})["hpsv2"].changes()
    """
    file, shown = (None if place is None else Path(place) for place in (json_file, pictures))
    _require_places(file, shown)
    asked = _asked(suites, prompts, images_per_prompt)
    models = {"": model} if against is None else {"": model, "against": against}
    runs = {}
    for which, path in models.items():
        total = max(suite.images * len(suite.prompts) for suite in asked)
        run = _run(path, engine, guidance, address, workers, overrides, images=total, suites=asked, by=judge_by)
        runs[which] = with_measures(run, measures, model, against)
    jobs = {
        (which, suite.name): _job(run, suite, seed, file, None if which else shown, which, single=len(suites) == 1)
        for which, run in runs.items()
        for suite in asked
    }
    found: dict[tuple[str, str], EvaluationResult] = {}
    go_on = "nothing is kept without --json FILE" if file is None else GO_ON
    with name_disk_errors(file or Path(), go_on), Progress() as progress:
        for which, run in runs.items():
            scored = judge(run, [jobs[which, suite.name] for suite in asked], progress, go_on=go_on)
            for suite, groups in zip(asked, scored, strict=True):
                job = jobs[which, suite.name]
                found[which, suite.name] = sum_up(job, suite.benchmark, groups, seed)
        if against is not None:
            for suite in asked:
                own, other = jobs["", suite.name], jobs["against", suite.name]
                found["", suite.name] = found["", suite.name].with_metrics(drift_of(own, other))
        results = {one.name: Comparison(found["", one.name], found.get(("against", one.name))) for one in asked}
        if file is not None:
            _write(file, results, {name: str(path) for name, path in (("model", model), ("against", against))})
        for job in jobs.values():
            job.partial.remove()
    return results


@dataclass(frozen=True, slots=True)
class _Suite:
    """What is asked for of a suite: all its prompts, and as many images of each."""

    benchmark: Benchmark
    prompts: list[Prompt]
    images: int

    @property
    def name(self) -> str:
        return self.benchmark.name


def _require_places(file: Path | None, shown: Path | None) -> None:
    """Raise a ConfigError where ``--json`` or ``--pictures`` cannot be written."""
    require_lasting(file, "--json")
    if file is not None:
        if file.is_dir():
            raise ConfigError(f"--json {file} is a directory; name a file in it")
        require_writable(file.parent, "--json")
    require_lasting(shown, "--pictures")
    if shown is not None:
        require_writable(shown, "--pictures")


def _asked(
    suites: Sequence[str], prompts: str | Path | Mapping[str, str | Path] | None, images: int | None
) -> list[_Suite]:
    benchmarks = [find_benchmark(suite, "--suite") for suite in suites]
    names = [benchmark.name for benchmark in benchmarks]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--suite names {repeated} twice; name it once")
    places = prompts if isinstance(prompts, Mapping) else {names[0]: prompts} if prompts is not None else {}
    if prompts is not None and len(names) > 1 and not isinstance(prompts, Mapping):
        raise ConfigError(f"--prompts {prompts}: of which of {', '.join(names)}? Write --prompts SUITE={prompts}")
    if strange := next((name for name in places if name not in names), None):
        raise ConfigError(
            f"--prompts {strange}={places[strange]}: no such suite is evaluated; {suggest(strange, names)}"
        )
    return [
        _Suite(
            benchmark,
            benchmark.load(str(places.get(benchmark.name) or benchmark.prompts), load_prompts),
            benchmark.images_per_prompt if images is None else images,
        )
        for benchmark in benchmarks
    ]


def _job(
    run: RunConfig, suite: _Suite, seed: int, file: Path | None, shown: Path | None, which: str, single: bool
) -> Job:
    """What is left to draw of a suite with one model; ``which``: "" or "against"."""
    further = {str(one.name): one.rewards for one in run.evaluation.suites}
    own = run.model_copy(update={"rewards": further.get(suite.name) or run.rewards})
    _require_judgeable(own, suite.prompts)
    prompts = drawable_prompts(own, policy_class(run.policy).check(run.policy), suite.prompts)
    partial = PartialResult()
    if file is not None:
        inputs = inputs_of(own, prompts, {"--images-per-prompt": suite.images, "--seed": seed})
        parts = [file.name, which, "" if single else suite.name, "partial"]
        partial = PartialResult(file.with_name(".".join(filter(None, parts))), inputs)
    requests, title = requests_for(prompts, suite.images, seed), f"{suite.name} {which}".strip()
    named = suite.name if suite.name in further else None
    if shown is None:
        return Job(own, requests, partial, title, suite=named)
    place = shown if single else shown / suite.name
    if not partial.groups and place.exists() and any(place.iterdir()):
        raise ConfigError(f"--pictures {place} is not empty; name another directory")
    drawn = {one.group_id for one in requests if suite.benchmark.has_pictures(place, one.prompt, suite.images)}
    partial.groups = {number: group for number, group in partial.groups.items() if number in drawn}

    def save(group: JudgedGroup) -> None:
        assert group.images is not None, "they are asked for"
        suite.benchmark.save_pictures(place, group.request.prompt, group.images)

    return Job(own, requests, partial, title, use=save, suite=named)


def _write(file: Path, results: Mapping[str, Comparison], models: Mapping[str, str]) -> None:
    """One suite of one model is a result as runs have it; else all of them by suite, with the changes."""
    first, *others = results.values()
    if first.against is None and not others:
        write_result(file, first.result)
        return
    suites = {
        name: {**asdict(one), "changes": {metric: asdict(change) for metric, change in one.changes().items()}}
        for name, one in results.items()
    }
    atomic_write(file, json.dumps({**models, "suites": suites}, indent=1))


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
        judge(run, [Job(run, requests, partial, "drawing", use=save)], progress, go_on=GO_ON, scoring=scoring)
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
    suites: Sequence[_Suite] = (),
    by: str | None = None,
) -> RunConfig:
    """The config of a run that only draws (and scores) ``images``, on a GPU where there is one, `--set` applied.

    The first suite's scorers are the run's; the others are its ``evaluation.suites``. ``by``: as ``--judge``.
    """
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
    if len(suites) > 1 and any(override.startswith("rewards") for override in overrides or ()):
        raise ConfigError("--set rewards: of which suite? Evaluate one alone with it, or name a judge with --judge")
    first, *others = [_scorers(suite.benchmark, by) for suite in suites] or [[NO_REWARD.model_dump()]]
    further = [
        {"benchmark": suite.name, "name": suite.name, "rewards": rewards}
        for suite, rewards in zip(suites[1:], others, strict=True)
    ]
    base = Path(base_location(str(model)) if Path(model).exists() else model)  # of an adapter
    known = (base / "config.json").is_file() and family_of(base, "policy.path")
    data = {
        "steps": 1,
        # A cluster's workers are not where this command was given.
        "policy": {"path": str(Path(model).absolute() if Path(model).exists() else model)}
        | ({"family": known} if known else {}),
        "prompts": {"train": "-"},  # those of the command line are drawn
        "rewards": first,
        "evaluation": {"enabled": bool(further), "suites": further},
        "rollout": rollout,
        "cluster": {"address": address},
    }
    run = validate_config(data, overrides, source="--set")
    resolve_samplers(run)  # a wrong option is said before anything starts
    scorers = [*run.rewards, *(reward for suite in run.evaluation.suites for reward in suite.rewards or [])]
    if any(reward.type == JUDGE and "model" not in reward.options for reward in scorers):
        raise ConfigError(
            "a suite is judged by a model that answers questions, and none is named; give --judge MODEL@URL, such as "
            "--judge Qwen3-VL-8B-Instruct@http://127.0.0.1:8000/v1"
        )
    if run.rollout.search is not None and run.rewards == [NO_REWARD]:
        raise ConfigError(f"rollout.search = {run.rollout.search!r} chooses by a scorer; name one in rewards")
    if run.cluster.address is None:  # else vLLM runs elsewhere
        require_fitting_build(run.rollout)
    return run


def _scorers(benchmark: Benchmark, by: str | None) -> list[dict[str, Any]]:
    """Those of a benchmark; the endpoint of ``--judge`` answers its questions."""
    named = re.fullmatch(r"(.+)@(https?://.+)", by or "")
    if by and not named:
        raise ConfigError(f"--judge {by} is no MODEL@URL, such as Qwen3-VL-8B-Instruct@http://127.0.0.1:8000/v1")
    rewards = [reward.model_dump() for reward in benchmark.rewards] or [NO_REWARD.model_dump()]
    for reward in rewards:
        if named and reward["type"] == JUDGE:
            reward["options"] = {**reward["options"], "model": named[1], "url": named[2]}
    return rewards


def _require_judgeable(run: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Say which prompts the scorers cannot judge, the first of them; a RunError where they can judge none."""
    check_search(run.rollout, run.rewards, prompts, "rollout")
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
