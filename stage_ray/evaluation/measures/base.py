"""What a measure is: a scorer that sees every image of an evaluation, and what its answers add up to."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from stage_ray.config import MeasureConfig, RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.evaluation.metrics import MetricValue
from stage_ray.records import MEASURES, SEARCH, Prompt, ScoredGroup
from stage_ray.registry import Registry
from stage_ray.rewards.build import with_models

KINDS = Registry("stage_ray.evaluation.measures", "Measure", "measure")
log = logging.getLogger(__name__)


class Measure(ABC):
    """One or several metrics of a policy beside a benchmark; no headline reads them. Built without arguments.

    Attributes:
        scorer: as ``rewards[].type``; it trains nothing. Its answers, features among them, are what `aggregate` gets.
            "": the config says which.
        options: of the scorer; those of the config go on top.
        of_learner: in a run the learner answers instead, who alone has policy and reference.
    """

    scorer: str = ""
    of_learner: bool = False
    options: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def aggregate(self, prompts: Sequence[Prompt], groups: Sequence[ScoredGroup]) -> dict[str, MetricValue]:
        """Metrics by name, each with an error and ``better``; one that cannot be had is absent.

        Args:
            groups: one of each prompt, in their order, with the scorer's column alone.
        """


def find_measure(name: str, key: str = MEASURES) -> Measure:
    """The measure of a name or dotted path; ``key`` is the config's, for messages.

    Raises:
        ConfigError: there is none (with the nearest name), or it is no `Measure`.
    """
    kind = KINDS.find(name, key)
    if not (isinstance(kind, type) and issubclass(kind, Measure)):
        raise ConfigError(f"{key} = {name!r} is no class that derives from stage_ray.evaluation.measures.Measure")
    return kind()


def resolve_measures(configs: Sequence[MeasureConfig], key: str = MEASURES) -> list[MeasureConfig]:
    """The configs with the scorer and all its options written out.

    Raises:
        ConfigError: a measure is unknown, lacks a scorer, or has the name of another one.
    """
    found: list[MeasureConfig] = []
    for index, config in enumerate(configs):
        measure = find_measure(config.measure, f"{key}.{index}")
        if measure.of_learner:
            found.append(config.model_copy(update={"name": config.column}))
            continue
        if not (scorer := config.scorer or measure.scorer):
            raise ConfigError(f"{key}.{index}: {config.measure} needs a scorer; set {key}.{index}.scorer, such as clip")
        options = {**measure.options, **config.options}
        reward = with_models(RewardConfig(type=scorer, name=config.name, options=options))
        name = reward.column if config.name or not measure.scorer else config.column
        if name in [other.name for other in found]:
            raise ConfigError(f"{key}: the name {name!r} is used twice; remove one, or give it a name of its own")
        found.append(config.model_copy(update={"name": name, "scorer": scorer, "options": reward.options}))
    return found


def select(group: ScoredGroup, names: Sequence[str]) -> ScoredGroup:
    """What some scorers said of a group, in its order of columns, and what a search did."""
    columns = [index for index, name in enumerate(group.names) if name in names]
    kept = tuple(group.names[index] for index in columns)
    return replace(
        group,
        names=kept,
        scores=group.scores[:, columns],
        valid=group.valid[:, columns],
        details=tuple({name: said[name] for name in (*kept, SEARCH) if name in said} for said in group.details),
        features={name: array for name, array in group.features.items() if name in kept},
        unasked=tuple(name for name in group.unasked if name in kept),
    )


def measured(
    configs: Sequence[MeasureConfig], prompts: Sequence[Prompt], groups: Sequence[ScoredGroup]
) -> dict[str, MetricValue]:
    """The metrics of all measures, from groups with the columns of their scorers, in any order."""
    ordered = sorted(groups, key=lambda group: group.group_id)
    found: dict[str, MetricValue] = {}
    for config in configs:
        if all(config.column in group.names for group in ordered):  # else the learner answers
            own = [select(group, [config.column]) for group in ordered]
            if why := _failures(own):
                log.warning("measure %s: %s", config.column, why)
            found |= find_measure(config.measure).aggregate(prompts, own)
    return found


def _failures(groups: Sequence[ScoredGroup]) -> str:
    """How many images a scorer has no answer for, and why the first; "" where it answered about all."""
    said = [details for group in groups for details in group.details]
    failed = [details for details in said if any("error" in it for it in details.values())]
    why = next((str(it["error"]) for details in failed[:1] for it in details.values()), "")
    return f"{len(failed)} of {len(said)} images are left out: {why}" if failed else ""
