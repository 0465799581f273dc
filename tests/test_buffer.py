"""The buffer's promise: no group is ever older than the bound when it trains."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage_ray.buffer import GroupBuffer


def test_a_slot_is_freed_when_its_group_is_trained_not_when_it_is_taken():
    buffer = GroupBuffer(groups_per_step=1, max_staleness=0)
    buffer.admit(0)
    buffer.ready(0, "payload")
    assert asyncio.run(buffer.take()) == [(0, "payload")]
    with pytest.raises(ValueError, match="all 1 slots are held"):
        buffer.admit(1)
    buffer.release([0])
    buffer.admit(1)


def test_groups_are_taken_in_the_order_of_admission_whatever_finishes_first():
    buffer = GroupBuffer(groups_per_step=2, max_staleness=1)
    for group in range(4):
        buffer.admit(group)
    for group in (3, 1, 2, 0):
        buffer.ready(group, f"p{group}")

    async def two_steps():
        return await buffer.take(), await buffer.take()

    assert asyncio.run(two_steps()) == ([(0, "p0"), (1, "p1")], [(2, "p2"), (3, "p3")])


def test_take_waits_for_the_oldest_group_even_if_enough_younger_ones_are_ready():
    async def scenario():
        buffer = GroupBuffer(groups_per_step=1, max_staleness=1)
        buffer.admit(0)
        buffer.admit(1)
        buffer.ready(1, "young")
        taking = asyncio.create_task(buffer.take())
        await asyncio.sleep(0)
        assert not taking.done()
        buffer.ready(0, "old")
        return await taking

    assert asyncio.run(scenario()) == [(0, "old")]


def test_a_replaced_group_keeps_its_place_in_the_order():
    buffer = GroupBuffer(groups_per_step=2, max_staleness=0)
    buffer.admit(0)
    buffer.admit(1)
    buffer.replace(0, 7)
    buffer.ready(1, "b")
    buffer.ready(7, "a")
    assert asyncio.run(buffer.take()) == [(7, "a"), (1, "b")]


def test_a_group_that_was_never_taken_cannot_be_released():
    buffer = GroupBuffer(groups_per_step=1, max_staleness=0)
    buffer.admit(0)
    with pytest.raises(ValueError, match="never taken"):
        buffer.release([0])


@given(
    n=st.integers(1, 4),
    k=st.integers(0, 3),
    choices=st.lists(st.integers(0, 2**16), min_size=20, max_size=200),
)
def test_no_schedule_of_generation_and_training_breaks_the_staleness_bound(n, k, choices):
    """Any interleaving of admit, finish and train: a group trains at most k versions after it was admitted."""
    buffer = GroupBuffer(groups_per_step=n, max_staleness=k)
    version, next_group, born, running = 0, 0, {}, []
    for choice in choices:
        if choice % 3 == 0 and buffer.free:
            buffer.admit(next_group)
            born[next_group] = version
            running.append(next_group)
            next_group += 1
        elif choice % 3 == 1 and running:
            group = running.pop(choice % len(running))
            buffer.ready(group, group)
        else:
            head = sorted(born)[:n]
            if len(head) == n and not set(head) & set(running):
                taken = [group for group, _ in asyncio.run(buffer.take())]
                assert taken == head
                assert all(0 <= version - born.pop(group) <= k for group in taken)
                version += 1
                buffer.release(taken)
