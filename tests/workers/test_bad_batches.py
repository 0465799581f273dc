"""A generation batch that cannot be used is noticed where it was drawn, and drawn again by a fresh worker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from stage_ray.records import Prompt, RolloutGroup, RolloutRequest, ScoredGroup
from stage_ray.workers.reward import score_error
from stage_ray.workers.rollout import RolloutWorker
from tests.actors.local_actor import LocalCluster, Roles, local_actors, run_of  # noqa: F401


class Engine:
    """Draws five tokens an image; ``bad`` is what it draws instead."""

    policy_version = 0
    codebook_size = 16

    def __init__(self, **bad: Any) -> None:
        self._bad = bad

    def generate(self, requests: Sequence[RolloutRequest], *, pictures: bool) -> list[RolloutGroup]:
        bad = {name: value for name, value in self._bad.items() if name != "images"}
        return [group_of(request, **bad) for request in requests]

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._bad.get("images", np.zeros((len(tokens), 8, 8, 3), np.uint8)))


def group_of(request: RolloutRequest, **changes: Any) -> RolloutGroup:
    count = len(request.seeds)
    floats = np.zeros((count, 5), np.float32)
    images = np.zeros((count, 8, 8, 3), np.uint8)
    fields = {
        "group_id": request.group_id,
        "prompt": request.prompt,
        "seeds": request.seeds,
        "tokens": np.full((count, 5), 15, np.int32),
        "logprobs": floats,
        "guided_logprobs": floats,
        "entropy": floats,
        "guided_entropy": floats,
        "images": images,
        "policy_version": 0,
        "worker": "w",
        "generate_s": 0.0,
    }
    return RolloutGroup(**(fields | changes))


REQUESTS = [RolloutRequest(group_id, Prompt(0, "a ring"), (1, 2, 3)) for group_id in (7, 8)]


class InProcess:
    """The real rollout worker, asked as an actor."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.worker = RolloutWorker(name, run_of(), None)
        self.worker._engine = engine

    async def setup(self) -> None:
        """It has its engine."""

    async def generate(self, *requests: RolloutRequest) -> tuple[Any, ...]:
        return self.worker.generate(*requests)

    async def decode(self, *groups: RolloutGroup) -> tuple[Any, ...]:
        return self.worker.decode(*groups)


@pytest.fixture
def worker_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process stays as it is where a worker would make one its own."""
    monkeypatch.setattr("stage_ray.workers.rollout.redirect_output", lambda log, role, worker: None)


BAD = {
    "tokens that are too many": ({"tokens": np.zeros((4, 5), np.int32)}, r"tokens int32 \[4, 5\], not int32 \[3, T\]"),
    "no tokens": ({"tokens": np.zeros((3, 0), np.int32)}, r"tokens int32 \[3, 0\]"),
    "tokens of another type": ({"tokens": np.zeros((3, 5), np.int64)}, "tokens int64"),
    "a token beyond the codebook": ({"tokens": np.full((3, 5), 16, np.int32)}, "tokens 16 to 16 of a codebook of 16"),
    "a token below it": ({"tokens": np.full((3, 5), -1, np.int32)}, "tokens -1 to -1"),
    "log-probabilities of fewer tokens": (
        {"guided_logprobs": np.zeros((3, 4), np.float32)},
        r"guided_logprobs float32 \[3, 4\], not float32 \[3, 5\]",
    ),
    "other seeds": ({"seeds": (1, 2, 4)}, r"seeds \(1, 2, 3\), and answered is 7 with \(1, 2, 4\)"),
    "another group": ({"group_id": 9}, "answered is 9"),
}


@pytest.mark.parametrize(("bad", "problem"), BAD.values(), ids=BAD)
def test_a_worker_says_what_is_wrong_with_what_its_engine_drew(worker_process, bad, problem):
    with pytest.raises(RuntimeError, match=f"^group 7 .*{problem}"):
        InProcess("rollout-0", Engine(**bad)).worker.generate(*REQUESTS)


BAD_IMAGES = {
    "too few": (np.zeros((5, 8, 8, 3), np.uint8), r"images are uint8 \[5, 8, 8, 3\], not uint8 \[6, "),
    "of another type": (np.zeros((6, 8, 8, 3), np.float32), "images are float32"),
    "grey": (np.zeros((6, 8, 8, 1), np.uint8), r"images are uint8 \[6, 8, 8, 1\]"),
}


@pytest.mark.parametrize(("images", "problem"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_a_worker_says_what_is_wrong_with_the_pictures_of_a_batch(worker_process, images, problem):
    worker = InProcess("rollout-0", Engine(images=images)).worker
    with pytest.raises(RuntimeError, match=problem):
        worker.decode(*worker.generate(*REQUESTS)[1:])


def test_a_worker_says_which_records_are_not_finite(worker_process):
    broken = Engine(logprobs=np.full((3, 5), np.nan, np.float32))
    answer, *_ = InProcess("rollout-0", broken).worker.generate(*REQUESTS)
    assert answer[3] == "group 7 has logprobs that are not finite"


def test_a_worker_says_that_its_engine_drew_too_few_groups(worker_process):
    worker = InProcess("rollout-0", Engine()).worker
    sample = worker._engine.generate
    worker._engine.generate = lambda requests, **how: sample(requests[1:], **how)
    with pytest.raises(RuntimeError, match="^1 groups where 2 were asked for$"):
        worker.generate(*REQUESTS)


@pytest.mark.parametrize(("details", "why"), [({}, ""), ({"clip": {"error": "no text"}}, " (no text)")])
def test_scores_that_failed_are_counted_and_their_scorer_named(details, why):
    bad = ScoredGroup(4, ("clip",), np.array([[np.nan]], np.float32), np.array([[False]]), (details,), 0.1)
    assert score_error(bad) == f"clip: 1 of 1 scores failed{why}"


def test_groups_that_were_drawn_badly_are_drawn_again_by_the_workers_successor(worker_process, local_actors):  # noqa: F811
    def inside(name: str) -> InProcess:
        return InProcess(name, Engine(**({} if "restart" in name else {"tokens": np.full((3, 5), 99, np.int32)})))

    async def scenario() -> None:
        roles = Roles(inside)
        cluster = LocalCluster(run_of(), roles)
        await cluster.rollouts.ready()
        again: list[int] = []
        groups = await cluster.generate(REQUESTS, on_retry=lambda: again.append(1))
        assert again == [1] and list(roles.actors)[-1] == "rollout-0-restart-1"
        drawn = [await group.tokens for group in groups]
        assert [(group.group_id, group.seeds) for group in drawn] == [(7, (1, 2, 3)), (8, (1, 2, 3))]
        assert cluster.restarts() == 1
        await cluster.rollouts.close()

    asyncio.run(scenario())


class PartlyBroken(Engine):
    """Draws numbers for every group but the first."""

    def generate(self, requests: Sequence[RolloutRequest], *, pictures: bool) -> list[RolloutGroup]:
        first, *others = super().generate(requests, pictures=pictures)
        return [group_of(requests[0], entropy=np.full_like(first.entropy, np.nan)), *others]


def test_a_group_that_is_not_finite_whichever_worker_draws_it_comes_with_that_reason(worker_process, local_actors):  # noqa: F811
    async def scenario() -> None:
        cluster = LocalCluster(run_of(), Roles(lambda name: InProcess(name, PartlyBroken())))
        await cluster.rollouts.ready()
        groups = await cluster.generate(REQUESTS)
        assert [group.error for group in groups] == ["group 7 has entropy that are not finite", ""]
        assert cluster.restarts() == cluster.run.cluster.attempts - 1, "each engine but the last was replaced"
        await cluster.rollouts.close()

    asyncio.run(scenario())
