"""Measures of `stage-ray evaluate`: their scorers beside the suites', and what these add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stage_ray.config import MeasureConfig, RunConfig
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import Benchmark, EvaluationResult, summarise
from stage_ray.evaluation.loop import conditions
from stage_ray.evaluation.measures.base import find_measure, measured, resolve_measures, select
from stage_ray.evaluation.measures.drift import IMAGES, drift_metrics
from stage_ray.evaluation.metrics import MetricValue
from stage_ray.inference.jobs import Job
from stage_ray.records import ScoredGroup

DRIFT = "stage_ray.evaluation.measures.drift_scorer.DriftScorer"


def with_measures(run: RunConfig, names: Sequence[str], model: str | Path, against: str | Path | None) -> RunConfig:
    """The config with the scorers of ``evaluation.measures``, and of measures by name, after those of every suite.

    A measure that in a run the learner answers is answered here by both models: ``model``, and ``against`` as its
    reference.

    Raises:
        ConfigError: a measure is unknown, has a scorer's name, or needs a reference and there is none.
    """
    found: list[MeasureConfig] = []
    scorers = [*run.rewards, *(reward for suite in run.evaluation.suites for reward in suite.rewards or [])]
    taken = {reward.column for reward in scorers}
    for measure in resolve_measures([*run.evaluation.measures, *(MeasureConfig(measure=name) for name in names)]):
        if measure.column in taken:
            raise ConfigError(f"measure {measure.column} has the name of a scorer of a suite; give it another name")
        if find_measure(measure.measure).of_learner:
            if against is None:
                raise ConfigError(f"measure {measure.column} compares with a reference: name it with --against")
            policies = {
                name: run.policy.model_dump(mode="json")
                | {"path": str(Path(it).absolute() if Path(it).exists() else it)}
                for name, it in (("policy", model), ("reference", against))
            }
            options = policies | {"rollout": run.rollout.model_dump(mode="json")}
            measure = measure.model_copy(update={"scorer": DRIFT, "options": options})
        found.append(measure)
    rewards = [measure.reward for measure in found]
    suites = [
        suite.model_copy(update={"rewards": [*(suite.rewards or run.rewards), *rewards]})
        for suite in run.evaluation.suites
    ]
    evaluation = run.evaluation.model_copy(update={"measures": found, "suites": suites})
    return run.model_copy(update={"rewards": [*run.rewards, *rewards], "evaluation": evaluation})


def sum_up(job: Job, benchmark: Benchmark, groups: Sequence[ScoredGroup], seed: int) -> EvaluationResult:
    """The result of a job whose groups have the columns of the suite's scorers and of all measures'."""
    measures, prompts = job.run.evaluation.measures, [request.prompt for request in job.requests]
    further = {measure.column for measure in measures}
    own = [reward for reward in job.run.rewards if reward.column not in further]
    result = summarise(benchmark, prompts, [select(group, [reward.column for reward in own]) for group in groups])
    run = job.run.model_copy(update={"rewards": own})
    image_measures = [measure for measure in measures if measure.scorer != DRIFT]
    known = conditions(run, benchmark, job.requests, seed, image_measures)
    return replace(result, conditions=known).with_metrics(measured(image_measures, prompts, groups))


def drift_of(own: Job, other: Job) -> dict[str, MetricValue]:
    """How far a model has moved from the other, on images of both; empty where no measure asks."""
    column = next((it.column for it in own.run.evaluation.measures if it.scorer == DRIFT), None)
    if column is None:
        return {}
    sides = [
        {
            request.prompt.index: job.partial.groups[request.group_id].features[column][:IMAGES]
            for request in job.requests
            if column in job.partial.groups[request.group_id].features
        }
        for job in (own, other)
    ]
    return drift_metrics(*sides)
