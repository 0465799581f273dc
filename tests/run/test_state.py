"""A run's state over stand-ins for its actors: what a checkpoint says agrees with itself, and none is ever damaged."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from stage_ray.errors import GroupsLostError, LearnerLostError, RunError
from stage_ray.pipeline.ledger import Ledger
from stage_ray.records import GroupRefs, Update
from stage_ray.run import checkpoint
from stage_ray.run.checkpoint import Checkpoint, CheckpointStore
from tests.audit import read_ledger
from tests.flaky import FlakyCluster, drive, history, run_state, timed_run, until


def saved(directory: Path) -> Checkpoint:
    """The newest checkpoint of a run, after making sure that its save left nothing beside it."""
    found = CheckpointStore(directory / "checkpoints", keep=1).latest()
    assert found is not None
    assert all(path.name.startswith("step-") for path in found.path.parent.iterdir())
    return found


class Slow:
    """A disk on which the second checkpoint takes its time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self._sync, self._calls = checkpoint.sync_path, 0
        patch.setattr(checkpoint, "sync_path", self._watched)

    def _watched(self, path: Path) -> None:
        self._calls += path.name == checkpoint.MANIFEST
        if self._calls == 2:
            self.reached.set()
            assert self.go_on.wait(30)
        self._sync(path)


@pytest.mark.parametrize("how", ["another part of the run fails", "the run is cancelled"])
def test_a_run_that_ends_while_a_checkpoint_is_finished_waits_for_it_and_leaves_it_whole(tmp_path, monkeypatch, how):
    run = timed_run(tmp_path)
    slow = Slow(monkeypatch)
    cluster = FlakyCluster(run)
    update = cluster.update

    async def breaks_down(groups: Sequence[GroupRefs]) -> Update:
        if cluster.version < 4:
            return await update(groups)
        await until(slow.reached.is_set)
        if how == "the run is cancelled":
            running.cancel()
            await asyncio.sleep(0)
        raise RunError("the learner refused")

    cluster.update = breaks_down  # type: ignore[method-assign]

    async def scenario() -> None:
        nonlocal running
        running = asyncio.create_task(drive(run, cluster))
        await until(lambda: slow.reached.is_set() or running.done())
        asyncio.get_running_loop().call_later(0.1, slow.go_on.set)
        with pytest.raises((RunError, asyncio.CancelledError)):
            await running
        assert slow.go_on.is_set(), "the run did not wait"

    running: asyncio.Task[None]
    asyncio.run(scenario())
    assert saved(tmp_path).step == 4
    asyncio.run(drive(run, FlakyCluster(run), resume=True))
    assert saved(tmp_path).step == 9


def test_a_disk_that_fails_while_a_checkpoint_is_finished_leaves_the_one_before_it(tmp_path, monkeypatch):
    run = timed_run(tmp_path)
    sync = checkpoint.sync_path

    def full(path: Path) -> None:
        if "step-000004" in str(path):
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(checkpoint, "sync_path", full)
    with pytest.raises(RunError, match=r"checkpoint of step 4 could not be written \(.*No space left.*are whole"):
        asyncio.run(drive(run, FlakyCluster(run)))
    assert saved(tmp_path).step == 2


def test_what_fails_while_a_checkpoint_waits_for_its_groups_is_not_said_of_the_disk(tmp_path):
    run = timed_run(tmp_path, steps=2)
    cluster = FlakyCluster(run, 0, lambda group_id: group_id >= 4)

    async def breaks_down(*_: Any, **more: Any) -> Any:
        raise RunError("rollout-0 died")

    async def scenario() -> None:
        state = run_state(run)
        async with state.stream(cluster) as stream:
            cluster.gates[2] = asyncio.Event()
            groups = await stream.next_batch()
            stream.mark_trained(groups, 0)
            stream.release(groups)
            cluster.generate = breaks_down  # type: ignore[method-assign]
            await state.checkpoint(1, cluster, stream, now=True)

    with pytest.raises(RunError, match="^rollout-0 died$"):
        asyncio.run(scenario())


def test_a_checkpoint_holds_the_very_groups_that_its_ledger_has_open(tmp_path):
    """A scorer gives up in the moment in which the checkpoint is begun, and a fresh group is admitted."""
    run = timed_run(tmp_path, order="arrival")
    cluster = FlakyCluster(run, 0, lambda group_id: group_id == 3)

    async def scenario() -> int:
        state = run_state(run)
        async with state.stream(cluster) as stream:
            cluster.gates[3] = asyncio.Event()
            groups = await stream.next_batch()
            update = await cluster.learner.update(groups)
            await cluster.publish(update.version)
            stream.mark_trained(groups, 0)
            await until(lambda: 3 in cluster.asked)
            before = stream.next_group
            cluster.gates[3].set()
            await state.checkpoint(1, cluster, stream, now=True)
            state.close()
            return stream.next_group - before

    assert asyncio.run(scenario()) == 1, "nothing was replaced meanwhile: this shows nothing"
    metadata = saved(tmp_path).metadata
    assert (
        list(Ledger(tmp_path / "ledger.jsonl", keep_bytes=metadata["ledger_bytes"]).open_groups()) == metadata["groups"]
    )
    assert metadata["next_group"] == 4 and metadata["failed"] == {"3": "it is beyond me"}
    asyncio.run(drive(run, FlakyCluster(run), resume=True))
    assert saved(tmp_path).step == 9, "and a resumed run replaces what failed"


def test_a_group_that_is_trained_while_its_checkpoint_waits_for_another_is_in_it(tmp_path):
    run = timed_run(tmp_path, groups=1, staleness=2, order="arrival", every=1)
    cluster = FlakyCluster(run)

    async def scenario() -> list[int]:
        trained = []
        state = run_state(run)
        async with state.stream(cluster) as stream:
            cluster.gates[0] = asyncio.Event()
            for step in range(2):
                (group,) = await stream.next_batch()
                trained.append(group.group_id)
                stream.mark_trained([group], step)
                if step == 0:
                    await state.checkpoint(1, cluster, stream)
                stream.release([group])
            cluster.gates[0].set()
            await state.saved()
        state.close()
        return trained

    _, overtook = asyncio.run(scenario())
    assert overtook > 0
    assert saved(tmp_path).metadata["groups"] == [0, overtook]


def test_a_learner_that_is_lost_again_and_again_without_a_new_checkpoint_ends_the_run(tmp_path):
    run, lost = timed_run(tmp_path), LearnerLostError("learner died")
    with closing(run_state(run)) as state:
        state.rewind(lost)
        state.rewind(lost)
        directory = state._store.begin(4)
        state._store.finish(4, directory, asdict(state._position))
        state.rewind(lost)
        assert state.step == 4, "the count begins anew with a new checkpoint"
        state.rewind(lost)
        with pytest.raises(RunError, match="^the learner was lost 3 times since step 4; learner died$"):
            state.rewind(lost)


def test_a_group_that_is_lost_while_its_checkpoint_is_written_is_generated_again_and_then_in_it(tmp_path):
    run = timed_run(tmp_path, staleness=2)
    cluster, lost = FlakyCluster(run), list[int]()
    save = cluster.save_groups

    async def loses_one(directory: Path, groups: Sequence[GroupRefs]) -> None:
        if not lost:
            lost.append(groups[-1].group_id)  # no update has taken it yet
            raise GroupsLostError(lost)
        await save(directory, groups)

    cluster.save_groups = loses_one  # type: ignore[method-assign]
    asyncio.run(drive(run, cluster, until=9))
    events = [event for event in read_ledger(tmp_path / "ledger.jsonl") if event["group_id"] == lost[0]]
    assert [event["event"] for event in events].count("reissued") == 1
    asyncio.run(drive(run, FlakyCluster(run), resume=True))
    assert saved(tmp_path).step == 9
    assert len(history(run)) == len({group for group, _, _ in history(run)}) == 18


@pytest.mark.parametrize("updates", [1, 2])
def test_a_checkpoint_is_given_up_when_it_loses_a_group_that_an_update_has_taken(tmp_path, capsys, updates):
    """Before that update's groups are released (1) or after (2): it is not generated again, and the run goes on."""
    run = timed_run(tmp_path, staleness=2)
    cluster, lost = FlakyCluster(run), list[int]()
    save = cluster.save_groups

    async def loses_the_oldest(directory: Path, groups: Sequence[GroupRefs]) -> None:
        if "step-000004" in str(directory):
            await until(lambda: cluster.version == 4 + updates)
            lost.append(groups[0].group_id)
            raise GroupsLostError(lost)
        await save(directory, groups)

    cluster.save_groups = loses_the_oldest  # type: ignore[method-assign]
    asyncio.run(drive(run, cluster, until=6))
    said = " ".join(capsys.readouterr().out.split())
    assert f"checkpoint of step 4 is given up: a node was lost, and with it group {lost[0]}, which a later" in said
    assert "reissued" not in {event["event"] for event in read_ledger(tmp_path / "ledger.jsonl")}
    assert saved(tmp_path).step == 2
    asyncio.run(drive(run, FlakyCluster(run), resume=True))
    assert saved(tmp_path).step == 9
    assert len(history(run)) == len({group for group, _, _ in history(run)}) == 18


def test_nothing_is_forgotten_before_the_checkpoint_is_loaded(tmp_path):
    """Its learner refuses it, or its groups are damaged."""
    run = timed_run(tmp_path)
    asyncio.run(drive(run, FlakyCluster(run), until=5))
    before = (tmp_path / "ledger.jsonl").read_bytes()
    assert len(before) > saved(tmp_path).metadata["ledger_bytes"], "nothing to forget: this shows nothing"

    async def refuses(*_: Any) -> Any:
        raise RunError("trained from another base model")

    for name in ("load_state", "load_groups"):
        cluster = FlakyCluster(run)
        setattr(cluster, name, refuses)
        with pytest.raises(RunError, match="another base model"):
            asyncio.run(drive(run, cluster, resume=True))
        assert (tmp_path / "ledger.jsonl").read_bytes() == before
    asyncio.run(drive(run, FlakyCluster(run), resume=True))
    assert saved(tmp_path).step == 9
