"""The experience buffer: slots for groups, and the rule that bounds staleness by construction.

A plain asyncio state machine over opaque references: no Ray, no payload, no tensor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Payload = TypeVar("Payload")


@dataclass(slots=True)
class _Slot(Generic[Payload]):
    group_id: int
    payload: Payload | None = None
    taken: bool = False


class GroupBuffer(Generic[Payload]):
    """Holds ``groups_per_step * (max_staleness + 1)`` slots, in the order of admission.

    Invariant: a slot is freed when its group is *trained* (`release`), not when it is taken. A group is admitted only
    into a free slot, so when it is admitted at version v fewer than ``(k + 1) N`` groups stand before and with it,
    and since groups train in order, N a step, it trains at version v + k at the latest: no group can be born stale.

    Example: N = 2, k = 0: the third group waits until the first two are trained, even while they are being trained.
        >>> buffer = GroupBuffer(groups_per_step=2, max_staleness=0)
        >>> buffer.admit(0), buffer.admit(1), buffer.free
        (None, None, 0)
        >>> buffer.ready(0, "a"), buffer.ready(1, "b")
        (None, None)
        >>> asyncio.run(buffer.take())
        [(0, 'a'), (1, 'b')]
        >>> buffer.free
        0
        >>> buffer.release([0, 1]); buffer.free
        2
    """

    def __init__(self, groups_per_step: int, max_staleness: int) -> None:
        self.groups_per_step = groups_per_step
        self.capacity = groups_per_step * (max_staleness + 1)
        self._slots: list[_Slot[Payload]] = []
        self._changed = asyncio.Event()

    @property
    def free(self) -> int:
        """Slots into which a group may be admitted now."""
        return self.capacity - len(self._slots)

    def admit(self, group_id: int) -> None:
        """Give a new group the next slot.

        Raises:
            ValueError: no slot is free, or the group has one already.
        """
        if self.free <= 0:
            raise ValueError(f"group {group_id} cannot be admitted: all {self.capacity} slots are held")
        if any(slot.group_id == group_id for slot in self._slots):
            raise ValueError(f"group {group_id} is in the buffer already")
        self._slots.append(_Slot(group_id))

    def replace(self, group_id: int, successor: int) -> None:
        """A group that cannot be scored gives its slot, and so its place in the order, to a fresh one."""
        slot = self._slot(group_id)
        slot.group_id, slot.payload = successor, None

    def ready(self, group_id: int, payload: Payload) -> None:
        """A group is generated and scored: it may be trained."""
        self._slot(group_id).payload = payload
        self._changed.set()

    async def take(self) -> list[tuple[int, Payload]]:
        """The N oldest groups, as soon as all of them are ready; their slots stay held until `release`."""
        while True:
            waiting = [slot for slot in self._slots if not slot.taken][: self.groups_per_step]
            batch = [(slot.group_id, slot.payload) for slot in waiting if slot.payload is not None]
            if len(batch) == self.groups_per_step:
                for slot in waiting:
                    slot.taken = True
                return batch
            self._changed.clear()
            await self._changed.wait()

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
            self._changed.clear()
            await self._changed.wait()
        return self.free

    def _slot(self, group_id: int) -> _Slot[Payload]:
        for slot in self._slots:
            if slot.group_id == group_id:
                return slot
        raise ValueError(f"group {group_id} is not in the buffer")
