"""The experience buffer: slots for groups, and the rule that bounds staleness by construction.

A plain asyncio state machine over opaque references: no Ray, no payload, no tensor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Payload = TypeVar("Payload")


@dataclass(slots=True, eq=False)
class _Slot(Generic[Payload]):
    group_id: int
    step: int  # updates done when it was admitted; its policy version is at least that
    payload: Payload | None = None
    arrival: int = 0
    taken: bool = False


class GroupBuffer(Generic[Payload]):
    """Holds ``groups_per_step * (max_staleness + 1)`` slots, in the order of admission.

    Invariant: a slot is freed when its group is *trained* (`release`), not when it is taken. A group is admitted only
    into a free slot, so when it is admitted at version v fewer than ``(k + 1) N`` groups stand before and with it.
    In ``strict`` order groups train as admitted, N a step, so it trains at version v + k at the latest: no group can be
    born stale. In ``arrival`` order a ready group may overtake one that is not, as long as every group can still train
    by its last step.

    Example: N = 2, k = 0: the third group waits until the first two are trained, even while they are being trained.
        >>> buffer = GroupBuffer(groups_per_step=2, max_staleness=0)
        >>> buffer.admit(0, 0), buffer.admit(1, 0), buffer.free
        (None, None, 0)
        >>> buffer.ready(0, "a", 0), buffer.ready(1, "b", 0)
        (None, None)
        >>> asyncio.run(buffer.take(step=0))
        [(0, 'a'), (1, 'b')]
        >>> buffer.free
        0
        >>> buffer.release([0, 1]); buffer.free
        2
    """

    def __init__(
        self, groups_per_step: int, max_staleness: int, order: Literal["strict", "arrival"] = "strict"
    ) -> None:
        self.groups_per_step = groups_per_step
        self.max_staleness = max_staleness
        self.capacity = groups_per_step * (max_staleness + 1)
        self._order = order
        self._slots: list[_Slot[Payload]] = []
        self._arrivals = 0
        self._changed = asyncio.Event()

    @property
    def free(self) -> int:
        """Slots into which a group may be admitted now."""
        return self.capacity - len(self._slots)

    @property
    def waiting(self) -> int:
        """Groups that are ready and not yet taken."""
        return sum(slot.payload is not None and not slot.taken for slot in self._slots)

    @property
    def pending(self) -> int:
        """Groups that are being drawn or scored."""
        return sum(slot.payload is None for slot in self._slots)

    def admit(self, group_id: int, step: int) -> None:
        """Give a new group the next slot, ``step`` updates into the run.

        Raises:
            ValueError: no slot is free, or the group has one already.
        """
        if self.free <= 0:
            raise ValueError(f"group {group_id} cannot be admitted: all {self.capacity} slots are held")
        if any(slot.group_id == group_id for slot in self._slots):
            raise ValueError(f"group {group_id} is in the buffer already")
        self._slots.append(_Slot(group_id, step))

    def replace(self, group_id: int, successor: int) -> None:
        """A group that cannot be scored gives its slot, and so its place in the order, to a fresh one."""
        slot = self._slot(group_id)
        slot.group_id, slot.payload = successor, None

    def ready(self, group_id: int, payload: Payload, policy_version: int) -> None:
        """A group is generated and scored: it may be trained. Its version may be newer than when it was admitted."""
        slot = self._slot(group_id)
        self._arrivals += 1
        slot.payload, slot.arrival, slot.step = payload, self._arrivals, max(slot.step, policy_version)
        self._changed.set()

    def lose(self, group_id: int) -> bool:
        """A group's payload is gone: it is drawn again, in its old place. Whether it had one to lose."""
        slot = self._slot(group_id)
        lost = slot.payload is not None
        slot.payload, slot.taken = None, False
        return lost

    def put_back(self, group_ids: Iterable[int]) -> None:
        """Taken groups were not trained after all: they stand where they stood."""
        for group_id in group_ids:
            self._slot(group_id).taken = False
        self._changed.set()

    async def take(self, step: int) -> list[tuple[int, Payload]]:
        """The N groups of update ``step`` (0-based), once they are ready; their slots stay held until `release`."""
        while True:
            batch = self._batch(step)
            if batch is not None:
                for slot in batch:
                    slot.taken = True
                return [(slot.group_id, slot.payload) for slot in batch if slot.payload is not None]
            await self._change()

    async def payload(self, group_id: int) -> Payload | None:
        """A held group's payload, once it is ready; None if the group was replaced in the meantime."""
        while True:
            slot = next((slot for slot in self._slots if slot.group_id == group_id), None)
            if slot is None or slot.payload is not None:
                return slot.payload if slot else None
            await self._change()

    def release(self, group_ids: Iterable[int]) -> None:
        """Groups are trained: only now do their slots become free.

        Raises:
            ValueError: a group was not taken.
        """
        for group_id in group_ids:
            slot = self._slot(group_id)
            if not slot.taken:
                raise ValueError(f"group {group_id} was never taken, so it cannot have been trained")
            self._slots.remove(slot)
        self._changed.set()

    async def wait_free(self) -> int:
        """Wait until at least one slot is free; how many are."""
        while self.free <= 0:
            await self._change()
        return self.free

    async def _change(self) -> None:
        """Wait until some group is ready or some slot is free."""
        self._changed.clear()
        await self._changed.wait()

    def _batch(self, step: int) -> list[_Slot[Payload]] | None:
        held = [slot for slot in self._slots if not slot.taken]
        if self._order == "strict":
            batch = held[: self.groups_per_step]
        else:
            ready = [slot for slot in held if slot.payload is not None]
            batch = self._by_arrival(held, ready, step)
        whole = len(batch) == self.groups_per_step and all(slot.payload is not None for slot in batch)
        return batch if whole else None

    def _by_arrival(
        self, held: Sequence[_Slot[Payload]], ready: Sequence[_Slot[Payload]], step: int
    ) -> list[_Slot[Payload]]:
        """First those that must train now lest a later step have more than N on its hands, then whatever came first."""
        size, batch = self.groups_per_step, []
        oldest_first = sorted(ready, key=lambda slot: (slot.step, slot.arrival))
        for ahead in range(self.max_staleness + 1):
            last_step = step + ahead  # of the groups that were drawn at version step + ahead - k or before
            due = [slot for slot in held if slot.step + self.max_staleness <= last_step]
            must = len(due) - size * ahead - sum(slot in batch for slot in due)
            choice = [slot for slot in oldest_first if slot in due and slot not in batch][: max(0, must)]
            if len(choice) < must:
                return []  # a group that must train now is not ready
            batch += choice
        rest = sorted((slot for slot in ready if slot not in batch), key=lambda slot: slot.arrival)
        return (batch + rest)[:size]

    def _slot(self, group_id: int) -> _Slot[Payload]:
        for slot in self._slots:
            if slot.group_id == group_id:
                return slot
        raise ValueError(f"group {group_id} is not in the buffer")
