"""The pools of reward workers, and how a group goes through all of them at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from typing import Any

from stage_ray.actors.client import ArgumentsLost, NoWorkersLeft, WorkerDied, WorkerLost
from stage_ray.actors.supervised import Pool, SupervisedActor
from stage_ray.cluster.learner import missing
from stage_ray.config import RunConfig, ScoringPool
from stage_ray.errors import GroupsLostError, RunError
from stage_ray.records import MEASURES, GroupRefs
from stage_ray.rewards.base import UNAVAILABLE
from stage_ray.workers.reward import RewardClient

log = logging.getLogger(__name__)


class ScorerPools:
    """One pool that scorers share, and one of each scorer that has its own actors. None waits for another."""

    def __init__(self, run: RunConfig, start: Callable[..., RewardClient] | None, limits: Mapping[str, Any]) -> None:
        """Start every worker without waiting for any.

        ``start`` makes one from its name and ``pool``, a `ScoringPool`; None: no pools. ``limits``: as `Pool` has them.
        """
        self._attempts = run.cluster.attempts
        suites = run.evaluation.suites if run.evaluation.enabled else []
        self._others = {MEASURES} | {str(suite.name) for suite in suites if suite.rewards != run.rewards}
        self._pools = [
            (Pool(config.role, config.workers, config.max_workers, partial(start, pool=config), **limits), config)
            for config in run.scoring_pools
            if start is not None
        ]

    @property
    def actors(self) -> list[SupervisedActor[RewardClient]]:
        """Every worker of every pool."""
        return [actor for pool, _ in self._pools for actor in pool.actors]

    async def ready(self) -> None:
        """As `Pool.ready`."""
        await asyncio.gather(*(pool.ready() for pool, _ in self._pools))

    async def close(self) -> None:
        """As `Pool.close`."""
        await asyncio.gather(*(pool.close() for pool, _ in self._pools))

    async def score(self, groups: Sequence[GroupRefs], suite: str | None = None) -> list[GroupRefs]:
        """Score groups in every pool, or by the scorers of a ``suite`` that has its own: the first pool has them.

        Where a worker is too slow or fails, its groups come back with that ``error``. One that dies says nothing about
        them: they go to others, up to ``cluster.attempts`` times in all. Of several pools each gets no more than its
        ``groups_per_call`` in a call. `MEASURES` stands for those of all measures.

        Raises:
            GroupsLostError: some of them are gone, with the node that held them; none is scored.
            NoWorkersLeft: a pool has no worker.
        """
        named = suite if suite in self._others else None
        pools = self._pools[:1] if named else self._pools
        answers = await asyncio.gather(*(self._score(pool, config, groups, named) for pool, config in pools))
        return [_together(parts) for parts in zip(*answers, strict=True)]

    async def _score(
        self, pool: Pool[RewardClient], config: ScoringPool, groups: Sequence[GroupRefs], suite: str | None
    ) -> list[GroupRefs]:
        # Where it is the only one, its caller has cut the groups for it.
        size = config.groups_per_call if len(self._pools) > 1 else len(groups)

        async def ask(part: Sequence[GroupRefs]) -> list[GroupRefs]:
            try:
                return await pool.call(
                    lambda worker: worker.score(part, suite),
                    config.timeout_s,
                    attempts=self._attempts,
                    retry=WorkerDied,
                )
            except NoWorkersLeft:
                raise
            except WorkerLost as lost:
                return [replace(group, error=str(lost)) for group in part]
            except ArgumentsLost as lost:
                raise GroupsLostError(await missing(part)) from lost

        async def call(part: Sequence[GroupRefs]) -> list[GroupRefs]:
            """Ask again while a service is down: an outage uses up no attempt, and no group."""
            pauses_s, began = chain((1.0, 2.0, 5.0), repeat(10.0)), time.monotonic()
            scored = await ask(part)
            while down := next((group.error for group in scored if UNAVAILABLE in group.error), ""):
                left_s = began + config.outage_s - time.monotonic()
                if left_s < 0:
                    raise RunError(
                        f"{down}: for longer than scoring.outage_s = {config.outage_s:g} s; start the service again, "
                        "then go on with --resume"
                    )
                log.warning("%s; the run waits for it, up to %.0f s more", down, left_s)
                await asyncio.sleep(next(pauses_s))
                scored = await ask(part)
            return scored

        parts = await asyncio.gather(*(call(groups[i : i + size]) for i in range(0, len(groups), size)))
        return [group for part in parts for group in part]


def _together(answers: Sequence[GroupRefs]) -> GroupRefs:
    """One group as all pools leave it: scores where all gave some, the first error, silent where all say so."""
    scores = tuple(ref for answer in answers for ref in answer.scores) if all(one.scores for one in answers) else ()
    error = next((one.error for one in answers if one.error), "")
    return replace(answers[0], scores=scores, error=error, silent=all(one.silent for one in answers))
