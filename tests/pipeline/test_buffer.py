"""The buffer's promise: no group is ever older than the bound when it trains."""

import asyncio
import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage_ray.pipeline import buffer as module
from stage_ray.pipeline.buffer import Failed, GroupBuffer, Slot


def test_a_slot_is_freed_when_its_group_is_trained_not_when_it_is_taken():
    buffer = GroupBuffer(groups_per_step=1, max_staleness=0)
    buffer.admit(0, 0)
    buffer.ready(0, "payload", 0)
    assert asyncio.run(buffer.take(0)) == [(0, "payload")]
    with pytest.raises(ValueError, match="all 1 slots are held"):
        buffer.admit(1, 0)
    buffer.free_slots([0])
    buffer.admit(1, 0)


def test_groups_are_taken_in_the_order_of_admission_whatever_finishes_first():
    buffer = GroupBuffer(groups_per_step=2, max_staleness=1)
    for group in range(4):
        buffer.admit(group, 0)
    for group in (3, 1, 2, 0):
        buffer.ready(group, f"p{group}", 0)

    async def two_steps():
        return await buffer.take(0), await buffer.take(0)

    assert asyncio.run(two_steps()) == ([(0, "p0"), (1, "p1")], [(2, "p2"), (3, "p3")])


def test_take_waits_for_the_oldest_group_even_if_enough_younger_ones_are_ready():
    async def scenario():
        buffer = GroupBuffer(groups_per_step=1, max_staleness=1)
        buffer.admit(0, 0)
        buffer.admit(1, 0)
        buffer.ready(1, "young", 0)
        taking = asyncio.create_task(buffer.take(0))
        await asyncio.sleep(0)
        assert not taking.done()
        buffer.ready(0, "old", 0)
        return await taking

    assert asyncio.run(scenario()) == [(0, "old")]


def test_a_group_of_a_checkpoint_that_is_newer_than_it_waits_for_its_step():
    """It was lost with a node while the checkpoint was written, and generated again by a later version."""

    async def scenario():
        buffer = GroupBuffer(groups_per_step=1, max_staleness=2, order="arrival")
        for group, version in ((7, 3), (8, 2)):
            buffer.admit(group, version)
            buffer.ready(group, f"p{group}", version)
        return await buffer.take(2), await buffer.take(3)

    assert asyncio.run(scenario()) == ([(8, "p8")], [(7, "p7")])


def test_a_failed_group_is_told_when_its_batch_is_settled_and_its_successor_has_its_place_in_the_order():
    buffer = GroupBuffer(groups_per_step=2, max_staleness=1)
    for group in range(4):
        buffer.admit(group, 0)
    buffer.fail(0, "too dark")
    buffer.fail(3, "too bright")

    async def scenario():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(buffer.take(0), 0.01)
        buffer.ready(1, "b", 0)
        assert await buffer.take(0) == [(0, Failed("too dark")), (1, "b")]
        assert buffer.failed == {0: "too dark", 3: "too bright"} and buffer.waiting == 1, "none is taken"
        buffer.replace(0, 7)
        buffer.ready(7, "a", 0)
        return await buffer.take(0)

    assert asyncio.run(scenario()) == [(7, "a"), (1, "b")]


def test_a_group_that_was_never_taken_cannot_be_released():
    buffer = GroupBuffer(groups_per_step=1, max_staleness=0)
    buffer.admit(0, 0)
    with pytest.raises(ValueError, match="never taken"):
        buffer.free_slots([0])


def test_in_order_of_arrival_a_ready_group_overtakes_one_that_may_still_wait():
    buffer = GroupBuffer(groups_per_step=1, max_staleness=1, order="arrival")
    buffer.admit(0, 0)
    buffer.admit(1, 0)
    buffer.ready(1, "fast", 0)
    assert asyncio.run(buffer.take(0)) == [(1, "fast")]


def test_in_order_of_arrival_a_group_that_must_train_now_is_waited_for():
    async def scenario():
        buffer = GroupBuffer(groups_per_step=1, max_staleness=1, order="arrival")
        buffer.admit(0, 0)
        buffer.admit(1, 1)
        buffer.ready(1, "fast", 1)
        taking = asyncio.create_task(buffer.take(1))
        await asyncio.sleep(0)
        assert not taking.done()
        buffer.ready(0, "due", 0)
        return await taking

    assert asyncio.run(scenario()) == [(0, "due")]


def test_a_group_drawn_later_than_it_was_admitted_may_wait_longer():
    buffer = GroupBuffer(groups_per_step=1, max_staleness=1, order="arrival")
    buffer.admit(0, 0)
    buffer.admit(1, 1)
    buffer.ready(1, "first", 1)
    buffer.ready(0, "drawn at version 1", 1)
    assert asyncio.run(buffer.take(1)) == [(1, "first")]


def test_what_becomes_of_a_group_is_known_also_when_its_slot_has_gone_to_another():
    async def scenario():
        buffer = GroupBuffer(groups_per_step=1, max_staleness=2, order="arrival")
        for group in range(3):
            buffer.admit(group, 0)
        buffer.ready(0, "a", 0)
        held = buffer.held()
        buffer.fail(1, "too dark")
        buffer.replace(1, 3)
        buffer.ready(2, "c", 0)
        await buffer.take(0)
        buffer.free_slots([0])
        return await buffer.outcomes(held)

    assert asyncio.run(scenario()) == {0: "a", 1: Failed("too dark"), 2: "c"}


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 4),
    k=st.integers(0, 3),
    order=st.sampled_from(["strict", "arrival"]),
    choices=st.lists(st.integers(0, 2**16), min_size=20, max_size=200),
)
def test_no_schedule_of_generation_and_training_breaks_the_staleness_bound(n, k, order, choices):
    """Any interleaving of admit, finish and train: a group trains at most k updates after the version that drew it,
    and the order never runs into a dead end: once all are ready, a batch can be taken."""
    buffer = GroupBuffer(groups_per_step=n, max_staleness=k, order=order)
    version, next_group, drawn, running = 0, 0, {}, []

    def train():
        nonlocal version
        groups = [group for group, _ in asyncio.run(buffer.take(version))]
        assert len(groups) == n
        assert all(0 <= version - drawn.pop(group) <= k for group in groups)
        assert order == "arrival" or groups == sorted(groups)
        version += 1
        buffer.free_slots(groups)

    for choice in choices:
        if choice % 3 == 0 and buffer.free:
            buffer.admit(next_group, version)
            drawn[next_group] = version
            running.append(next_group)
            next_group += 1
        elif choice % 3 == 1 and running:
            group = running.pop(choice % len(running))
            if choice % 2 and order == "arrival":
                drawn[group] = version  # it was drawn late, with a newer version than when it was admitted
            buffer.ready(group, group, drawn[group])
        elif buffer._batch(version) is not None:
            train()
    for group in running:
        buffer.ready(group, group, drawn[group])
    while buffer.waiting >= n:
        train()


def test_a_group_whose_payload_is_gone_is_waited_for_again_in_its_old_place():
    buffer: GroupBuffer[str] = GroupBuffer(groups_per_step=2, max_staleness=0)
    for group, payload in ((0, "a"), (1, "b")):
        buffer.admit(group, 0)
        buffer.ready(group, payload, 0)

    async def scenario():
        assert await buffer.take(0) == [(0, "a"), (1, "b")]
        assert buffer.invalidate(0)
        buffer.requeue([0, 1])
        assert not buffer.invalidate(0), "it is being drawn again already"
        assert (buffer.pending, buffer.waiting, buffer.free) == (1, 1, 0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(buffer.take(0), 0.01)
        buffer.ready(0, "again", 0)
        assert await buffer.take(0) == [(0, "again"), (1, "b")]

    asyncio.run(scenario())


def literal_batch(buffer: GroupBuffer[str], step: int) -> list[Slot[str]] | None:
    """A batch in order of arrival as its rule says it, from all slots: with lists, and nothing counted before."""
    size, held, batch = buffer.groups_per_step, buffer.held(), []
    for ahead in range(buffer.max_staleness + 1):
        due = [slot for slot in held if slot.step + buffer.max_staleness <= step + ahead and slot not in batch]
        must = max(0, len(due) - size * ahead)
        ready = [slot for slot in due if slot.payload is not None]
        if len(ready) < must:
            return None
        batch += sorted(ready, key=lambda slot: (slot.step, slot.arrival))[:must]
    rest = [slot for slot in held if slot.payload is not None and slot not in batch]
    batch = (batch + sorted(rest, key=lambda slot: slot.arrival))[:size]
    return batch if len(batch) == size else None


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 4), st.integers(0, 3), st.lists(st.integers(0, 2**16), min_size=20, max_size=150))
def test_a_batch_of_arrivals_is_what_a_look_at_every_group_gives_whatever_happened_to_them(n, k, choices):
    buffer: GroupBuffer[str] = GroupBuffer(groups_per_step=n, max_staleness=k, order="arrival")
    step, names = 0, iter(range(10**6))
    for choice in choices:
        held = [slot.group_id for slot in buffer.held()]
        pending = [slot.group_id for slot in buffer.held() if slot.outcome is None]
        action, number = choice % 7, choice // 7
        if action <= 1 and buffer.free:
            buffer.admit(next(names), step)
        elif action <= 3 and pending:
            buffer.ready(pending[number % len(pending)], "payload", step - number % 2)
        elif action == 4 and pending:
            group = pending[number % len(pending)]
            buffer.fail(group, "too dark")
            buffer.replace(group, next(names))
        elif action == 5 and held:
            buffer.invalidate(held[number % len(held)])
        elif buffer._batch(step) is not None:
            taken = [group for group, _ in asyncio.run(buffer.take(step))]
            if number % 3:
                buffer.free_slots(taken)
                step += 1
            else:
                buffer.requeue(taken)
        assert buffer._batch(step) == literal_batch(buffer, step)
        assert buffer.waiting == sum(slot.payload is not None for slot in buffer.held())


def test_what_a_group_costs_the_buffer_in_order_of_arrival_does_not_grow_with_the_batch():
    """Counted in lines of the buffer that are executed, of which a look at a group is one at least."""

    def lines_a_group(size: int) -> float:
        lines = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != module.__file__:
                return None
            lines += event == "line"
            return trace

        async def three_steps() -> None:
            buffer: GroupBuffer[str] = GroupBuffer(size, 1, "arrival")
            for group in range(2 * size):
                buffer.admit(group, 0)
            for step in range(3):
                taking = asyncio.create_task(buffer.take(step))
                for slot in buffer.held()[:size]:
                    buffer.ready(slot.group_id, "payload", step)
                    await asyncio.sleep(0)  # each wakes the one that waits
                buffer.free_slots([group for group, _ in await taking])
                for group in range(size):
                    buffer.admit((step + 2) * size + group, step + 1)

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            asyncio.run(three_steps())
        finally:
            sys.settrace(before)
        return lines / (3 * size)

    assert lines_a_group(128) < 1.5 * lines_a_group(16)
