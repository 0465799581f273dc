"""The suites of a run: benchmarks with their prompts and scorers, and what evaluations of one have found so far."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from stage_ray.config import EvaluationConfig, RewardConfig, RunConfig, SuiteConfig
from stage_ray.errors import ConfigError, suggest
from stage_ray.evaluation.base import EvaluationResult, find_benchmark, read_result
from stage_ray.evaluation.measures.base import resolve_measures
from stage_ray.files import read_json
from stage_ray.rewards.build import with_models

EVALUATION, BEST_FILE = "evaluation", "best.json"
REFERENCE = ".reference"  # in a run's EVALUATION: images of the reference, as tokens


def resolve_suites(run: RunConfig) -> RunConfig:
    """The config with what suites and measures leave open written out, and all scorers' models.

    Raises:
        ConfigError: a benchmark or measure is unknown, a name is taken or no name of a directory, no scorer of the
            run judges ``evaluation.benchmark``, or ``checkpoint.keep_best`` names none.
    """
    _check_judged(run)
    run = run.model_copy(update={"rewards": [with_models(reward) for reward in run.rewards]})
    suites = [_resolved(run, suite, f"evaluation.suites.{i}") for i, suite in enumerate(run.evaluation.suites)]
    measures = resolve_measures(run.evaluation.measures)
    if measures and run.prompts.heldout is None:
        raise ConfigError("evaluation.measures sees the images of prompts.heldout, which is not set; set it")
    update = {"suites": suites, "measures": measures}
    run = run.model_copy(update={"evaluation": run.evaluation.model_copy(update=update)})
    names = [str(suite.name) for suite in [own_suite(run)] * (run.prompts.heldout is not None) + suites]
    served: dict[str, str] = {}
    for name in names:
        other = served.setdefault(re.sub(r"\W", "_", name), name)  # as Prometheus has it
        if names.count(name) > 1 or other != name:
            raise ConfigError(f"evaluation.suites: {other!r} and {name!r} would share one name; give each its own name")
    if (best := run.checkpoint.keep_best) is not None and best not in names:
        raise ConfigError(f"checkpoint.keep_best = {best!r} is no suite of this run; {suggest(best, names)}")
    return run


def own_suite(run: RunConfig) -> SuiteConfig:
    """That of ``evaluation.benchmark``, ``evaluation.images_per_prompt`` and the run's own prompts and scorers."""
    return SuiteConfig.model_construct(
        benchmark=run.evaluation.benchmark,
        name=find_benchmark(run.evaluation.benchmark).name,
        prompts=run.prompts.heldout,
        images_per_prompt=run.evaluation.images_per_prompt,
        rewards=run.rewards,
    )


def is_rewarded(run: RunConfig, suite: SuiteConfig) -> bool:
    """Whether a scorer that judges a suite is one that the run trains on.

    Those judge that are of a type which the benchmark asks for, or all of the suite's where there is none. Two are the
    same unless an option that both give differs.
    """

    def same(one: RewardConfig, other: RewardConfig) -> bool:
        both = one.options.keys() & other.options.keys()
        return one.type == other.type and all(one.options[key] == other.options[key] for key in both)

    asked = {reward.type for reward in find_benchmark(suite.benchmark).rewards}
    scorers = suite.rewards or []
    judges = [reward for reward in scorers if reward.type in asked] or scorers
    return any(same(judge, reward) for judge in judges for reward in run.rewards if reward.weight)


def suite_dirs(run_dir: Path) -> list[Path]:
    """Where the results of a run's suites are: those of its own prompts first, then each further one's."""
    root = run_dir / EVALUATION
    return [root, *sorted(path for path in root.glob("[!.]*") if path.is_dir())]


def results(directory: Path) -> dict[int, EvaluationResult]:
    """The evaluations in a directory by the updates done, in that order, without their images.

    Raises:
        RunError: a file is damaged.
    """
    found = {}
    for path in [directory / "before.json", *directory.glob("step-*.json"), directory / "after.json"]:
        if (result := read_result(path)) is not None:
            found[int((read_json(path) or {}).get("policy_version", -1))] = replace(result, images=())
    return dict(sorted((step, result) for step, result in found.items() if step >= 0))  # an early version gave none


def _check_judged(run: RunConfig) -> None:
    """Refuse a benchmark that a config names and none of the run's scorers judges: it would give no number."""
    name, scorers = run.evaluation.benchmark, {reward.type for reward in run.rewards}
    judges = {reward.type for reward in find_benchmark(name).rewards}
    theirs = judges | {scorer for scorer in scorers if "." in scorer}  # one of your own may give the verdicts, too
    default = EvaluationConfig().benchmark  # of runs with any scorers: without GenEval's, these add up to their means
    evaluated = run.evaluation.enabled and run.prompts.heldout is not None
    if evaluated and name != default and judges and theirs.isdisjoint(scorers):
        raise ConfigError(
            f"evaluation.benchmark = {name!r} is judged by {' or '.join(sorted(judges))}, none of the rewards: "
            "add it, with weight: 0 if it is not to be trained on, or name the benchmark in evaluation.suites"
        )


def _resolved(run: RunConfig, suite: SuiteConfig, key: str) -> SuiteConfig:
    benchmark = find_benchmark(suite.benchmark, f"{key}.benchmark")
    name = suite.name or benchmark.name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"{key}.name: {name!r}, the benchmark's, is no name of a directory; set one of letters, -, _")
    rewards = [with_models(reward) for reward in suite.rewards or benchmark.rewards or run.rewards]
    columns = [reward.column for reward in rewards]
    if repeated := next((name for name in columns if columns.count(name) > 1), None):
        raise ConfigError(f"{key}.rewards: the name {repeated!r} is used twice; give each scorer a name of its own")
    prompts, images = suite.prompts or benchmark.prompts, suite.images_per_prompt or benchmark.images_per_prompt
    resolved = {"name": name, "prompts": prompts, "images_per_prompt": images, "rewards": rewards}
    return suite.model_copy(update=resolved)
