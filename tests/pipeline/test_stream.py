"""The stream over stand-ins that only wait: what happens in which order, whatever takes how long."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage_ray.config import RunConfig
from stage_ray.errors import GroupsLostError, RunError
from stage_ray.pipeline.ledger import Ledger
from stage_ray.pipeline.prompts import PromptCursor
from stage_ray.pipeline.stream import GroupStream
from stage_ray.records import GroupRefs, RolloutRequest, ScoredGroup
from stage_ray.run.checkpoint import CheckpointStore
from stage_ray.workers.reward import is_silent
from tests.audit import audit, read_ledger
from tests.flaky import PROMPTS, FlakyCluster, drive, history, timed_run, until


def unlucky(group_id: int) -> bool:
    """A third of the groups, and their successors, and one whose successor's successor is too."""
    return group_id % 3 == 1


def told(run: RunConfig, *clusters: FlakyCluster) -> list[tuple[int, int, int, int]]:
    """(group, prompt, version, step) of what was trained, after making sure that nothing was lost."""
    saved = CheckpointStore(Path(run.run_dir) / "checkpoints", keep=1).latest()
    assert saved is not None and saved.step == run.steps
    found = audit(
        read_ledger(Path(run.run_dir) / "ledger.jsonl"),
        groups_per_step=run.rollout.groups_per_step,
        max_staleness=run.pipeline.max_staleness,
        held=saved.metadata["groups"],
    )
    assert found.sound and found.dropped > run.steps, found
    prompts = {group: prompt for cluster in clusters for group, prompt in cluster.prompts.items()}
    return [(group, prompts[group], version, step) for group, version, step in history(run)]


def test_a_run_that_goes_on_draws_the_same_groups_without_guidance(tmp_path: Path) -> None:
    run = timed_run(tmp_path)
    run = run.model_copy(update={"rollout": run.rollout.model_copy(update={"unguided_share": 0.25})})
    first, second = FlakyCluster(run), FlakyCluster(run, 1)
    asyncio.run(drive(run, first, until=5))
    asyncio.run(drive(run, second, resume=True))
    again = first.guided.keys() & second.guided.keys()
    assert again and set(first.guided | second.guided) == set(range(len(first.guided | second.guided)))
    for cluster in (first, second):
        assert cluster.guided == {group: group % 4 != 3 for group in cluster.guided}


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_which_groups_take_the_place_of_failed_ones_does_not_depend_on_when_they_fail(tmp_path, staleness):
    seen = []
    for seed in range(3):
        run = timed_run(tmp_path / str(seed), groups=3, staleness=staleness)
        cluster = FlakyCluster(run, seed, unlucky)
        asyncio.run(drive(run, cluster))
        seen.append(told(run, cluster))
    assert seen[0] == seen[1] == seen[2]
    assert {version for _, _, version, step in seen[0] if step == 8} == {8 - staleness, 8}, "successors are fresh"


@pytest.mark.parametrize(("staleness", "last"), [(1, 4), (2, 4), (2, 5)])
def test_a_resumed_run_has_failed_groups_in_their_places(tmp_path, staleness, last):
    whole = timed_run(tmp_path / "whole", groups=3, staleness=staleness)
    cluster = FlakyCluster(whole, 0, unlucky)
    asyncio.run(drive(whole, cluster))
    broken = timed_run(tmp_path / "broken", groups=3, staleness=staleness)
    before, after = FlakyCluster(broken, 1, unlucky), FlakyCluster(broken, 2, unlucky)
    asyncio.run(drive(broken, before, until=last))
    saved = CheckpointStore(tmp_path / "broken" / "checkpoints", keep=1).latest()
    assert saved is not None and saved.metadata["failed"], "nothing had failed: this run shows nothing"
    asyncio.run(drive(broken, after, resume=True))
    assert told(broken, before, after) == told(whole, cluster)


@pytest.mark.parametrize(("order", "at_once"), [("strict", False), ("arrival", True)])
def test_a_failed_group_is_replaced_at_once_or_in_strict_order_when_its_batch_is_settled(tmp_path, order, at_once):
    run = timed_run(tmp_path, steps=1, order=order)
    cluster = FlakyCluster(run, 0, lambda group_id: group_id == 1)

    async def scenario() -> bool:
        cluster.gates[0] = asyncio.Event()
        running = asyncio.create_task(drive(run, cluster))
        await until(lambda: {1, 2, 3} <= cluster.asked and (not at_once or 4 in cluster.prompts))
        await asyncio.sleep(0.05)
        early = 4 in cluster.prompts
        cluster.gates[0].set()
        await running
        return early

    assert asyncio.run(scenario()) == at_once
    assert 4 in cluster.prompts and {group for group, _, _ in history(run)} <= {0, 2, 3, 4}


def test_a_group_older_than_the_bound_is_never_written_down_as_trained(tmp_path):
    run = timed_run(tmp_path, staleness=1)

    async def train_late() -> None:
        ledger = Ledger(tmp_path / "ledger.jsonl")
        stream = GroupStream(FlakyCluster(run), run, PromptCursor(PROMPTS, 0), ledger, 0, step=0)  # type: ignore
        stream.mark_trained([GroupRefs(7, 1, None), GroupRefs(8, 0, None)], 2)

    with pytest.raises(RunError, match=r"group 8 is 2 versions old, pipeline.max_staleness is 1"):
        asyncio.run(train_late())


@pytest.mark.parametrize("order", ["strict", "arrival"])
def test_a_batch_that_lost_groups_with_a_node_is_requeued_and_they_are_generated_again(tmp_path, order):
    run = timed_run(tmp_path, steps=1, order=order)
    cluster = FlakyCluster(run)

    async def scenario() -> tuple[list[int], list[int]]:
        async with GroupStream(cluster, run, PromptCursor(PROMPTS, 0), ledger, 0, step=0) as stream:  # type: ignore
            taken = await stream.next_batch()
            cluster.prompts.clear()
            stream.requeue(taken, GroupsLostError([taken[0].group_id]))
            again = await stream.next_batch()
            await until(lambda: taken[0].group_id in cluster.prompts)
            stream.mark_trained(again, 0)
            stream.release(again)
            return [group.group_id for group in taken], [group.group_id for group in again]

    ledger = Ledger(tmp_path / "ledger.jsonl")
    taken, again = asyncio.run(scenario())
    reissued = [event["group_id"] for event in read_ledger(tmp_path / "ledger.jsonl") if event["event"] == "reissued"]
    assert reissued == taken[:1]
    assert again == taken if order == "strict" else len(again) == len(taken)


class MeasuredCluster(FlakyCluster):
    """Batches of one group: those of even groups take three seconds and use a tenth, the others one second and half."""

    async def generate(self, requests: Sequence[RolloutRequest], **more: Any) -> list[GroupRefs]:
        groups = await super().generate(requests, **more)
        return [replace(g, **dict(zip(("generate_s", "mfu"), self.told(g.group_id), strict=True))) for g in groups]

    def told(self, group_id: int) -> tuple[float, float]:
        return (1.0, 0.5) if group_id % 2 else (3.0, 0.1)


def test_the_utilisation_of_rollout_weighs_every_batch_by_its_seconds_and_is_absent_without_any(tmp_path):
    run = timed_run(tmp_path, steps=1, staleness=0)

    async def metrics_of(cluster: FlakyCluster, name: str) -> dict[str, float]:
        ledger = Ledger(tmp_path / name)
        async with GroupStream(cluster, run, PromptCursor(PROMPTS, 0), ledger, 0, step=0) as stream:  # type: ignore
            await stream.next_batch()
            first = stream.metrics()
            assert "mfu/rollout" not in stream.metrics(), "nothing was generated since"
            return first

    assert asyncio.run(metrics_of(MeasuredCluster(run), "known"))["mfu/rollout"] == pytest.approx(0.2)
    assert "mfu/rollout" not in asyncio.run(metrics_of(FlakyCluster(run), "unknown"))


class UnfiniteCluster(FlakyCluster):
    """Its engines draw no numbers for some groups, whoever draws them."""

    async def generate(self, requests: Sequence[RolloutRequest], **more: Any) -> list[GroupRefs]:
        groups = await super().generate(requests, **more)
        return [replace(group, error="it has no numbers" if unlucky(group.group_id) else "") for group in groups]


@pytest.mark.parametrize("order", ["strict", "arrival"])
def test_a_group_that_no_engine_draws_in_numbers_is_never_scored_and_another_takes_its_place(tmp_path, order):
    run = timed_run(tmp_path, order=order)
    cluster = UnfiniteCluster(run)
    asyncio.run(drive(run, cluster))
    trained = [group for group, *_ in history(run)]
    assert len(trained) == run.steps * 2 and not any(map(unlucky, trained)) and not any(map(unlucky, cluster.asked))
    dropped = [event for event in read_ledger(tmp_path / "ledger.jsonl") if event["event"] == "dropped"]
    assert dropped and {event["why"] for event in dropped} == {"it has no numbers"}


def test_engines_that_draw_no_numbers_at_all_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "unlucky", lambda group_id: True)
    run = timed_run(tmp_path)
    with pytest.raises(RunError, match="5 groups in a row could not be scored; the last one: it has no numbers"):
        asyncio.run(drive(run, UnfiniteCluster(run)))


class SilentCluster(FlakyCluster):
    """Its scorers tell the images of some groups not apart."""

    silent: Callable[[int], bool] = staticmethod(unlucky)

    async def score(self, groups: Sequence[GroupRefs]) -> list[GroupRefs]:
        """As they say."""
        return [replace(group, silent=self.silent(group.group_id)) for group in await super().score(groups)]


def redrawing(directory: Path, times: int, **more: Any) -> RunConfig:
    run = timed_run(directory, groups=3, **more)
    return run.model_copy(update={"algorithm": run.algorithm.model_copy(update={"redraw_silent": times})})


@pytest.mark.parametrize("staleness", [0, 2])
def test_what_silent_groups_are_redrawn_as_does_not_depend_on_time_and_a_resumed_run_redraws_the_same(
    tmp_path, staleness
):
    seen = []
    for seed in range(2):
        run = redrawing(tmp_path / str(seed), 9, staleness=staleness)
        cluster = SilentCluster(run, seed)
        asyncio.run(drive(run, cluster))
        seen.append(told(run, cluster))
    broken = redrawing(tmp_path / "broken", 9, staleness=staleness)
    before, after = SilentCluster(broken, 2), SilentCluster(broken, 3)
    asyncio.run(drive(broken, before, until=4))
    asyncio.run(drive(broken, after, resume=True))
    assert seen[0] == seen[1] == told(broken, before, after)
    assert not any(unlucky(group) for group, *_ in seen[0])
    dropped = [event for event in read_ledger(tmp_path / "0" / "ledger.jsonl") if event["event"] == "dropped"]
    assert {event["why"] for event in dropped} == {"no scorer told its images apart"}


@pytest.mark.parametrize(("order", "last"), [("strict", 4), ("arrival", 4)])
def test_a_slot_is_redrawn_so_often_and_then_its_group_is_trained_also_in_a_resumed_run(tmp_path, order, last):
    run = redrawing(tmp_path, 2, order=order)
    before, after = SilentCluster(run, 0), SilentCluster(run, 1)
    before.silent = after.silent = lambda group_id: True
    asyncio.run(drive(run, before, until=last))
    asyncio.run(drive(run, after, resume=True))
    whole = redrawing(tmp_path / "whole", 2, order=order)
    cluster = SilentCluster(whole)
    cluster.silent = before.silent
    asyncio.run(drive(whole, cluster))
    assert order == "arrival" or told(run, before, after) == told(whole, cluster)
    ended = Counter(event["event"] for event in read_ledger(tmp_path / "ledger.jsonl"))
    assert ended["trained"] == 3 * run.steps and 2 * ended["trained"] <= ended["dropped"] <= 2 * ended["trained"] + 6


@pytest.mark.parametrize("times", [0, 1])
def test_redrawn_groups_are_counted_and_none_is_unless_it_is_wanted(tmp_path, times):
    run = redrawing(tmp_path, times)
    cluster = SilentCluster(run)

    async def first_batch() -> dict[str, float]:
        async with GroupStream(cluster, run, PromptCursor(PROMPTS, 0), ledger, 0, step=0) as stream:  # type: ignore
            await stream.next_batch()
            return stream.metrics()

    ledger = Ledger(tmp_path / "ledger.jsonl")
    metrics = asyncio.run(first_batch())
    assert (metrics["rollout/redrawn"], metrics["scoring/replaced"]) == (times, 0)


def test_a_group_is_silent_where_no_scorer_that_counts_tells_its_images_apart():
    apart, alike = [0.1, 0.9], [0.3, 0.3 + 1e-7]

    def silent(*columns: list[float], weights: Sequence[float] = (1.0, -2.0)) -> bool:
        scores = np.array(columns, np.float32).T
        return is_silent(ScoredGroup(0, ("a", "b"), scores, np.isfinite(scores), ({}, {}), 0.0), weights)

    assert silent(alike, alike) and not silent(apart, alike) and not silent(alike, apart)
    assert silent(apart, alike, weights=(0.0, 1.0)) and not silent(alike, [0.3, np.nan])
