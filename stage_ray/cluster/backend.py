"""An evaluation over the workers of a cluster: batches are drawn, then scored, by whichever worker is free."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from ray.exceptions import ObjectLostError

from stage_ray.actors.client import first_line
from stage_ray.cluster.cluster import InferenceCluster
from stage_ray.cluster.object_store import batches_at_once
from stage_ray.config import RunConfig
from stage_ray.errors import GroupsLostError, RunError
from stage_ray.records import JudgedGroup, RolloutRequest, ScoredGroup
from stage_ray.rewards import merge_scores


class ClusterBackend:
    """A `stage_ray.evaluation.loop.Backend` over rollout and reward workers; without ``scoring`` it draws only.

    With a ``suite`` its scorers judge, else the run's own.
    """

    def __init__(
        self, cluster: InferenceCluster, run: RunConfig, *, scoring: bool = True, suite: str | None = None
    ) -> None:
        self._cluster, self._attempts, self._scoring, self._suite = cluster, run.cluster.attempts, scoring, suite
        self.images_per_batch = run.rollout.images_per_batch
        own = {str(one.name): one.rewards for one in run.evaluation.suites}.get(str(suite)) or run.rewards
        self._columns = [reward.column for reward in own]
        self.batches_at_once = batches_at_once(run)

    async def judge(self, requests: Sequence[RolloutRequest], *, images: bool) -> list[JudgedGroup]:
        """As `Backend.judge`; up to ``cluster.attempts`` times where workers or nodes are lost.

        Raises:
            RunError: the last attempt failed too.
        """
        error = ""
        for _ in range(self._attempts):
            try:
                groups = await self._cluster.generate(requests)
                if self._scoring:
                    groups = await self._cluster.score(groups, self._suite)
                    if unscored := [group for group in groups if not group.scores]:  # no reward worker gave an answer
                        error = first_line(unscored[0].error)
                        continue
                    parts = await asyncio.gather(*(self._cluster.fetch(group.scores) for group in groups))
                    scored = [merge_scores(each, self._columns) for each in parts]
                else:
                    scored = [_unscored(request) for request in requests]
                wanted = [group.images for group in groups] if images else []
                pictures = await self._cluster.fetch(wanted) or [None] * len(groups)  # None where not wanted
                return [JudgedGroup(*judged) for judged in zip(requests, scored, pictures, strict=True)]
            except (GroupsLostError, ObjectLostError) as lost:
                error = first_line(lost)
        raise RunError(f"evaluation: {error}")


def _unscored(request: RolloutRequest) -> ScoredGroup:
    """What no scorer says of a group, as `stage_ray.rewards.score_groups` puts it."""
    count = len(request.seeds)
    scores = np.empty((count, 0), np.float32)
    return ScoredGroup(request.group_id, (), scores, scores.astype(bool), ({},) * count, 0.0)
