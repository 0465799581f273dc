"""The reward actor: groups and their pictures in, errors for the driver and scored groups for the learner out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stage_ray.actors.client import Client, Worker, loading
from stage_ray.config import RunConfig
from stage_ray.observability.logs import redirect_output
from stage_ray.observability.worker_metrics import WorkerMetrics
from stage_ray.records import GroupRefs, RolloutGroup, ScoredGroup
from stage_ray.rewards import build_rewards, score_groups


class RewardWorker(Worker):
    """Scorers of the run that share a pool, called on whole batches of groups."""

    def __init__(
        self, name: str, run: RunConfig, log: str | None, rank: int = 0, columns: Sequence[str] | None = None
    ) -> None:
        """Load nothing yet: `setup` does; ``columns``: of its scorers, all by default."""
        redirect_output(log, "reward", name)
        self._metrics = WorkerMetrics("reward", name)
        self._rewards, self._columns = run.rewards, columns

    @loading()
    def setup(self, address: str = "") -> None:
        """Make its scorers."""
        self._scorers = build_rewards(self._rewards, self._columns)

    def score(self, *objects: Any) -> tuple[Any, ...]:
        """Groups and pictures, alternating, as a rollout worker returned them -> `score_error`s, then scored groups."""
        groups: list[RolloutGroup] = [
            replace(group, images=images) for group, images in zip(objects[::2], objects[1::2], strict=True)
        ]
        self._metrics.begin(group.group_id for group in groups)
        scored = score_groups(self._scorers, groups)
        self._metrics.done(groups)
        return (tuple(map(score_error, scored)), *scored)


def score_error(group: ScoredGroup) -> str:
    """Why not every score of a group may be used, the first reason; "" where all may."""
    for column, name in enumerate(group.names):
        if failed := int((~group.valid[:, column]).sum()):
            # The first image's error that this scorer gave, where it gave any.
            why = next((str(d[name]["error"]) for d in group.details if "error" in d.get(name, {})), "")
            return f"{name}: {failed} of {len(group.valid)} scores failed" + (f" ({why})" if why else "")
    return ""


class RewardClient(Client):
    """A reward worker as the driver asks it."""

    async def score(self, groups: Sequence[GroupRefs]) -> list[GroupRefs]:
        """The groups with their ``scores`` and ``error``."""
        objects = [ref for group in groups for ref in (group.tokens, group.images)]
        errors, scored = self.ask_objects(RewardWorker.score, len(groups), *objects)
        answers = zip(groups, scored, await errors, strict=True)
        return [replace(group, scores=(scores,), error=error) for group, scores, error in answers]
