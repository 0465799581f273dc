"""An evaluation over the workers of a cluster: batches are drawn, then scored, by whichever worker is free."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from ray.exceptions import ObjectLostError

from stage_ray.actors.client import first_line
from stage_ray.cluster.cluster import InferenceCluster
from stage_ray.cluster.object_store import batches_at_once
from stage_ray.config import RunConfig
from stage_ray.errors import GroupsLostError, RunError
from stage_ray.records import MEASURES, GroupRefs, JudgedGroup, RolloutRequest, ScoredGroup
from stage_ray.rewards import merge_scores


class ClusterBackend:
    """A `stage_ray.evaluation.loop.Backend` over rollout and reward workers; without ``scoring`` it draws only.

    With a ``suite`` its scorers judge, else the run's own.
    """

    def __init__(
        self,
        cluster: InferenceCluster,
        run: RunConfig,
        *,
        scoring: bool = True,
        suite: str | None = None,
        measuring: bool = False,
    ) -> None:
        """``measuring``: also with the scorers of ``evaluation.measures``; then ``drawn`` are all groups so far."""
        self._cluster, self._attempts, self._scoring, self._suite = cluster, run.cluster.attempts, scoring, suite
        self.images_per_batch = run.rollout.images_per_batch
        own = {str(one.name): one.rewards for one in run.evaluation.suites}.get(str(suite)) or run.rewards
        self._columns = [reward.column for reward in own]
        self.batches_at_once = batches_at_once(run)
        self._measuring, self.drawn = measuring, list[GroupRefs]()
        self._measures = [it.column for it in run.evaluation.measures if measuring and it.scorer]

    async def judge(
        self, requests: Sequence[RolloutRequest], *, images: bool, tokens: bool = False
    ) -> list[JudgedGroup]:
        """As `Backend.judge`; up to ``cluster.attempts`` times where workers or nodes are lost.

        Raises:
            RunError: the last attempt failed too.
        """
        error = ""
        for _ in range(self._attempts):
            try:
                groups = await self._cluster.generate(requests)
                if self._scoring:
                    sets = [(self._suite, self._columns)] + [(MEASURES, self._measures)] * bool(self._measures)
                    answers = await asyncio.gather(*(self._cluster.score(groups, name) for name, _ in sets))
                    # A reward worker may have given no answer.
                    if unscored := [group for answer in answers for group in answer if not group.scores]:
                        error = first_line(unscored[0].error)
                        continue
                    scored, *further = [
                        await self._merged(answer, columns) for answer, (_, columns) in zip(answers, sets, strict=True)
                    ]
                else:
                    scored, further = [_unscored(request) for request in requests], []
                measured = further[0] if further else [None] * len(groups)
                wanted = [group.images for group in groups] if images else []
                pictures = await self._cluster.fetch(wanted) or [None] * len(groups)  # None where not wanted
                self.drawn += [replace(group, images=None, scores=()) for group in groups if self._measuring]
                drawn = await self._cluster.fetch([group.tokens for group in groups]) if tokens else []
                ids = [group.tokens for group in drawn] or [None] * len(groups)
                columns = zip(requests, scored, pictures, measured, ids, strict=True)
                return [JudgedGroup(*judged) for judged in columns]
            except (GroupsLostError, ObjectLostError) as lost:
                error = first_line(lost)
        raise RunError(f"evaluation: {error}")

    async def show(self, tokens: np.ndarray, shown: float) -> np.ndarray:
        """As `Backend.show`."""
        return await self._cluster.show(tokens, shown)

    async def _merged(self, groups: Sequence[GroupRefs], columns: Sequence[str]) -> list[ScoredGroup]:
        """The scores of groups, of all pools, with these columns."""
        parts = await asyncio.gather(*(self._cluster.fetch(group.scores) for group in groups))
        return [merge_scores(each, columns) for each in parts]


def _unscored(request: RolloutRequest) -> ScoredGroup:
    """What no scorer says of a group, as `stage_ray.rewards.score_groups` puts it."""
    count = len(request.seeds)
    scores = np.empty((count, 0), np.float32)
    return ScoredGroup(request.group_id, (), scores, scores.astype(bool), ({},) * count, 0.0)
