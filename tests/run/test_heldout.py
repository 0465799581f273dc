"""The held-out evaluation over stand-ins that count the pictures which are held at once."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stage_ray.config import RunConfig
from stage_ray.config.load import validate_config
from stage_ray.observability.progress import Progress
from stage_ray.records import GroupRefs, Prompt, RolloutRequest, ScoredGroup
from stage_ray.run.heldout import HeldOutEvaluation
from tests.flaky import timed_run

PROMPTS = [Prompt(i, f"prompt {i}", {"tag": "colors"}) for i in range(60)]


class Pictures:
    """What a reference to pictures stands for."""


class CountingCluster:
    """Draws at once and scores slowly, so that everything that may be drawn ahead is."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Pictures] = weakref.WeakSet()
        self.most_alive = self.scored = 0
        self.scorer = asyncio.Lock()

    async def generate(self, requests: Sequence[RolloutRequest]) -> list[GroupRefs]:
        groups = []
        for request in requests:
            self.alive.add(pictures := Pictures())
            groups.append(GroupRefs(request.group_id, 0, request, pictures))
        self.most_alive = max(self.most_alive, len(self.alive))
        return groups

    async def score(self, groups: Sequence[GroupRefs], suite: str | None = None) -> list[GroupRefs]:
        async with self.scorer:
            await asyncio.sleep(0)
            self.scored += len(groups)
        return [replace(group, scores=(scored(group.tokens),)) for group in groups]

    async def fetch(self, refs: Sequence[Any]) -> list[Any]:
        images = np.zeros((1, 8, 8, 3), np.uint8)
        return [images if isinstance(ref, Pictures) else ref for ref in refs]


def scored(request: RolloutRequest) -> ScoredGroup:
    """Good where the seed is even."""
    good = np.array([[seed % 2 == 0] for seed in request.seeds])
    details = tuple({"geneval": {"verdict": bool(one), "soft": 1.0}} for (one,) in good)
    return ScoredGroup(request.group_id, ("geneval",), good.astype(np.float32), np.ones_like(good), details, 0.0)


def evaluating_run(directory: Any) -> RunConfig:
    """Two rollout workers and four reward workers, a group a batch."""
    data = timed_run(directory).model_dump(mode="json")
    data["prompts"]["heldout"] = "none"
    data["evaluation"] |= {"enabled": True, "images_per_prompt": 2, "sample_prompts": 12}
    return validate_config(data)


@pytest.mark.parametrize("groups", [20, 60])
def test_pictures_of_an_evaluation_are_held_for_as_many_batches_as_keep_the_workers_busy(tmp_path, monkeypatch, groups):
    monkeypatch.setattr(HeldOutEvaluation, "_draw", lambda self, *args: asyncio.sleep(0))  # which keeps its twelve
    cluster: Any = CountingCluster()
    evaluation = HeldOutEvaluation(cluster, evaluating_run(tmp_path), PROMPTS[:groups], tmp_path, Progress())
    gc.disable()  # pictures must go when their batch is done, not when cycles are looked for
    try:
        result = asyncio.run(evaluation.evaluate("before", 0))
    finally:
        gc.enable()
    assert cluster.scored == groups and result.headline_value is not None
    assert cluster.most_alive == 2 * 2 + 4


def test_a_picture_of_samples_is_asked_for_at_once_so_that_one_version_draws_it(tmp_path):
    async def draw() -> CountingCluster:
        cluster: Any = CountingCluster()
        evaluation = HeldOutEvaluation(cluster, evaluating_run(tmp_path), PROMPTS, tmp_path, Progress())
        await evaluation.sample(50)
        await evaluation.drawn()
        return cluster

    assert asyncio.run(draw()).most_alive == 12
    assert (tmp_path / "samples" / "step-000050.png").exists()
