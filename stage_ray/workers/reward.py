"""The reward actor: groups and their pictures in, receipts for the driver and scored groups for the learner out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stage_ray.actors.health import Pinged
from stage_ray.config import RewardConfig
from stage_ray.observability.logs import redirect_output
from stage_ray.observability.worker_metrics import WorkerMetrics
from stage_ray.records import RolloutGroup, ScoredGroup, ScoreReceipt


class RewardWorker(Pinged):
    """Every scorer of the run, called on whole batches of groups."""

    def __init__(self, name: str, rewards: Sequence[RewardConfig], log: str | None) -> None:
        """Load nothing yet: `setup` does."""
        redirect_output(log, "reward", name)
        self._metrics = WorkerMetrics("reward", name)
        self._rewards = rewards

    def setup(self) -> None:
        """Make every scorer."""
        from stage_ray.rewards import build_rewards

        self._scorers = build_rewards(self._rewards)

    def score(self, *objects: Any) -> tuple[Any, ...]:
        """Groups and pictures alternating, as a rollout worker returned them -> receipts, then the scored groups."""
        from stage_ray.rewards import score_groups

        groups: list[RolloutGroup] = [
            replace(group, images=images) for group, images in zip(objects[::2], objects[1::2], strict=True)
        ]
        self._metrics.begin(group.group_id for group in groups)
        scored = score_groups(self._scorers, groups)
        self._metrics.done(groups)
        return (tuple(receipt(group) for group in scored), *scored)


def receipt(group: ScoredGroup) -> ScoreReceipt:
    """Whether every score of a group may be used, and the first reason where not.

    Example:
        >>> import numpy as np
        >>> bad = ScoredGroup(4, ("clip",), np.array([[np.nan]], np.float32), np.array([[False]]), ({},), 0.1)
        >>> receipt(bad).error
        'clip: 1 of 1 scores failed'
    """
    for column, name in enumerate(group.names):
        failed = int((~group.valid[:, column]).sum())
        if failed:
            why = next((str(d[name]["error"]) for d in group.details if "error" in d.get(name, {})), "")
            text = f"{name}: {failed} of {len(group.valid)} scores failed" + (f" ({why})" if why else "")
            return ScoreReceipt(group.group_id, ok=False, error=text)
    return ScoreReceipt(group.group_id, ok=True)
