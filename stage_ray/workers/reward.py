"""The reward actor: groups and their pictures in, errors for the driver and scored groups for the learner out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stage_ray.actors.client import Client, Worker, loading
from stage_ray.config import RunConfig
from stage_ray.observability.logs import redirect_output
from stage_ray.observability.worker_metrics import WorkerMetrics
from stage_ray.records import CONSTANT_STD, MEASURES, GroupRefs, RolloutGroup, ScoredGroup
from stage_ray.rewards import build_rewards, score_groups


class RewardWorker(Worker):
    """Scorers of the run that share a pool, called on batches; the first pool also has those of suites and measures."""

    def __init__(
        self, name: str, run: RunConfig, log: str | None, rank: int = 0, columns: Sequence[str] | None = None
    ) -> None:
        """``columns``: of its scorers, all by default."""
        redirect_output(log, "reward", name)
        self._metrics = WorkerMetrics("reward", name)
        self._rewards = [reward for reward in run.rewards if columns is None or reward.column in columns]
        self._run, self._columns = run, columns

    @loading()
    def setup(self, address: str = "") -> None:
        self._scorers = build_rewards(self._run.rewards, self._columns)
        self._suite_scorers = {}
        first = self._columns is None or tuple(self._columns) == self._run.scoring_pools[0].columns
        for number, suite in enumerate(self._run.evaluation.suites if self._run.evaluation.enabled and first else []):
            if suite.rewards != self._run.rewards:
                found = build_rewards(suite.rewards or [], key=f"evaluation.suites.{number}.rewards")
                self._suite_scorers[str(suite.name)] = found
        if first and self._run.evaluation.enabled and (measures := self._run.evaluation.measures):
            rewards = [measure.reward for measure in measures if measure.scorer]
            self._suite_scorers[MEASURES] = build_rewards(rewards, key=MEASURES)

    def score(self, *objects: Any, suite: str | None = None) -> tuple[Any, ...]:
        """Groups and pictures, alternating, as a rollout worker returned them -> verdicts, then scored groups.

        A verdict is `score_error` and `is_silent` of a group, by the run's own scorers or those of a ``suite``.
        """
        groups: list[RolloutGroup] = [
            replace(group, images=images) for group, images in zip(objects[::2], objects[1::2], strict=True)
        ]
        self._metrics.begin(group.group_id for group in groups)
        scored = score_groups(self._scorers if suite is None else self._suite_scorers[suite], groups)
        self._metrics.done(groups)
        weights = [reward.weight for reward in self._rewards]
        verdicts = ((score_error(group), suite is None and is_silent(group, weights)) for group in scored)
        return (tuple(verdicts), *scored)


def score_error(group: ScoredGroup) -> str:
    """Why not every score of a group may be used, the first reason; "" where all may."""
    for column, name in enumerate(group.names):
        if (failed := int((~group.valid[:, column]).sum())) and name not in group.unasked:
            # The first image's error that this scorer gave, where it gave any.
            why = next((str(d[name]["error"]) for d in group.details if "error" in d.get(name, {})), "")
            return f"{name}: {failed} of {len(group.valid)} scores failed" + (f" ({why})" if why else "")
    return ""


def is_silent(group: ScoredGroup, weights: Sequence[float]) -> bool:
    """Whether no scorer whose weight is not 0 told the images of a group apart; False where a score failed."""
    asked = group.asked
    counting = group.scores[:, (np.array(weights) != 0) & asked]  # NumPy: this process may do without torch
    return bool(group.valid[:, asked].all() and (counting.std(axis=0, ddof=1) <= CONSTANT_STD).all())


class RewardClient(Client):
    """A reward worker as the driver asks it."""

    async def score(self, groups: Sequence[GroupRefs], suite: str | None = None) -> list[GroupRefs]:
        """The groups with their ``scores``, ``error`` and ``silent``; ``suite``: whose scorers, None: the run's own."""
        objects = [ref for group in groups for ref in (group.tokens, group.images)]
        verdicts, scored = self.ask_objects(RewardWorker.score, len(groups), *objects, suite=suite)
        answers = zip(groups, scored, await verdicts, strict=True)
        return [replace(group, scores=(ref,), error=error, silent=silent) for group, ref, (error, silent) in answers]
