"""One model's pictures scored without a run, beside another's where one is named: ``stage-ray evaluate``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stage_ray.config import RunConfig
from stage_ray.config.paths import require_lasting
from stage_ray.errors import ConfigError, suggest
from stage_ray.evaluation.base import Benchmark, EvaluationResult, changes, find_benchmark, write_result
from stage_ray.evaluation.loop import requests_for
from stage_ray.evaluation.metrics import MetricValue
from stage_ray.evaluation.partial import PartialResult
from stage_ray.files import atomic_write, name_disk_errors, require_writable
from stage_ray.inference.config import inference_config, require_judgeable
from stage_ray.inference.jobs import GO_ON, Job, inputs_of, judge
from stage_ray.inference.measures import drift_of, sum_up, with_measures
from stage_ray.observability.progress import Progress
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.policies import policy_class
from stage_ray.records import JudgedGroup, Prompt
from stage_ray.run.preflight import drawable_prompts


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
    benchmarks, runs = [suite.benchmark for suite in asked], {}
    for which, path in models.items():
        total = max(suite.images * len(suite.prompts) for suite in asked)
        run = inference_config(
            path, engine, guidance, address, workers, overrides, images=total, benchmarks=benchmarks, by=judge_by
        )
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
    require_judgeable(own, suite.prompts)
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
