"""The experience buffer: slots for groups, and the rule that bounds staleness by construction.

A plain asyncio state machine over opaque references: no Ray, no payload, no tensor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Payload = TypeVar("Payload")


@dataclass(frozen=True, slots=True)
class Failed:
    """The outcome of a group that cannot be scored; ``why`` in one sentence.

    Example:
        >>> Failed("geneval: 2 of 8 scores are not finite").why
        'geneval: 2 of 8 scores are not finite'
    """

    why: str


class GroupsFailedError(Exception):
    """Every group of the next update is settled, and some failed: `GroupBuffer.replace` them and take again.

    Attributes:
        reasons: group -> why, in the order of slots.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(f"groups {list(reasons)} cannot be scored")
        self.reasons = reasons


@dataclass(slots=True, eq=False)
class _Slot(Generic[Payload]):
    group_id: int
    step: int  # updates done when it was admitted; its policy version is at least that
    outcome: Payload | Failed | None = None  # None while it is generated and scored
    arrival: int = 0
    taken: bool = False

    @property
    def payload(self) -> Payload | None:
        """What it holds, once it is ready."""
        return None if isinstance(self.outcome, Failed) else self.outcome


class GroupBuffer(Generic[Payload]):
    """Holds ``groups_per_step * (max_staleness + 1)`` slots, in the order of admission.

    Invariant: a slot is freed when its group is *trained* (`free_slots`), not when it is taken. A group gets only
    a free slot, so when it is admitted at version v at most ``(k + 1) N`` groups, itself among them, are to train.
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
        >>> buffer.free_slots([0, 1]); buffer.free
        2
    """

    def __init__(
        self, groups_per_step: int, max_staleness: int, order: Literal["strict", "arrival"] = "strict"
    ) -> None:
        self.groups_per_step = groups_per_step
        self.max_staleness = max_staleness
        self.capacity = groups_per_step * (max_staleness + 1)
        self._order = order
        self._slots: list[_Slot[Payload]] = []  # in the order of admission
        self._by_group: dict[int, _Slot[Payload]] = {}  # of thousands of slots, with a thousand GPUs
        self._arrivals = 0
        self._changed = asyncio.Event()
        self._watched: dict[int, list[asyncio.Future[Payload | Failed]]] = {}

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
        """Groups that are being generated or scored."""
        return sum(slot.outcome is None for slot in self._slots)

    @property
    def failed(self) -> dict[int, str]:
        """Groups that failed and were not replaced yet, and why, in the order of slots."""
        return _reasons(self._slots)

    def admit(self, group_id: int, step: int) -> None:
        """Give a new group the next slot, ``step`` updates into the run.

        Raises:
            ValueError: no slot is free, or the group has one already.
        """
        if self.free <= 0:
            raise ValueError(f"group {group_id} cannot be admitted: all {self.capacity} slots are held")
        if group_id in self._by_group:
            raise ValueError(f"group {group_id} is in the buffer already")
        self._by_group[group_id] = _Slot(group_id, step)
        self._slots.append(self._by_group[group_id])

    def ready(self, group_id: int, payload: Payload, policy_version: int) -> None:
        """A group is generated and scored: it may be trained. Its version may be newer than when it was admitted."""
        slot = self._slot(group_id)
        self._arrivals += 1
        slot.arrival, slot.step = self._arrivals, max(slot.step, policy_version)
        self._settle(slot, payload)

    def fail(self, group_id: int, why: str) -> None:
        """A group cannot be scored. It keeps its slot until it is replaced."""
        self._settle(self._slot(group_id), Failed(why))

    def replace(self, group_id: int, successor: int) -> None:
        """Give the slot of a failed group, and so its place in the order, to a fresh one."""
        slot = self._slot(group_id)
        slot.group_id, slot.outcome = successor, None
        self._by_group[successor] = self._by_group.pop(group_id)

    def invalidate(self, group_id: int) -> bool:
        """Forget the lost payload of a group, which keeps its slot to be generated again; whether it had one."""
        slot = self._slot(group_id)
        had_payload = slot.payload is not None
        if had_payload:
            slot.outcome, slot.taken = None, False
        return had_payload

    def requeue(self, group_ids: Iterable[int]) -> None:
        """Undo `take`: the groups were not trained, and keep their places in the order."""
        for group_id in group_ids:
            self._slot(group_id).taken = False
        self._changed.set()

    async def take(self, step: int) -> list[tuple[int, Payload]]:
        """The N groups of update ``step`` (0-based), once they are ready; their slots stay held until `free_slots`.

        Raises:
            GroupsFailedError: all of them are settled, but not all are ready; none is taken.
        """
        while True:
            batch = self._batch(step)
            if batch is not None:
                if reasons := _reasons(batch):
                    raise GroupsFailedError(reasons)
                for slot in batch:
                    slot.taken = True
                return [(slot.group_id, slot.payload) for slot in batch if slot.payload is not None]
            self._changed.clear()
            await self._changed.wait()

    def outcomes(self, group_ids: Iterable[int] | None = None) -> dict[int, asyncio.Future[Payload | Failed]]:
        """The outcomes of groups, payload or failure, as futures that outlive the groups' slots.

        Args:
            group_ids: which groups; None for all that are not taken, in the order of slots.
        """
        if group_ids is None:
            group_ids = [slot.group_id for slot in self._slots if not slot.taken]
        return {group_id: self._outcome(self._slot(group_id)) for group_id in group_ids}

    def free_slots(self, group_ids: Iterable[int]) -> None:
        """Free the slots of groups, which are trained now.

        Raises:
            ValueError: a group was not taken.
        """
        for group_id in group_ids:
            if not self._slot(group_id).taken:
                raise ValueError(f"group {group_id} was never taken, so it cannot have been trained")
            del self._by_group[group_id]
        self._slots = [slot for slot in self._slots if slot.group_id in self._by_group]

    def _settle(self, slot: _Slot[Payload], outcome: Payload | Failed) -> None:
        slot.outcome = outcome
        for watcher in self._watched.pop(slot.group_id, []):
            if not watcher.done():
                watcher.set_result(outcome)
        self._changed.set()

    def _outcome(self, slot: _Slot[Payload]) -> asyncio.Future[Payload | Failed]:
        watcher: asyncio.Future[Payload | Failed] = asyncio.get_running_loop().create_future()
        if slot.outcome is None:
            self._watched.setdefault(slot.group_id, []).append(watcher)
        else:
            watcher.set_result(slot.outcome)
        return watcher

    def _batch(self, step: int) -> list[_Slot[Payload]] | None:
        """The slots of an update, if there are N and all are settled."""
        held = [slot for slot in self._slots if not slot.taken]
        if self._order == "strict":
            batch = held[: self.groups_per_step]
        else:
            ready = [slot for slot in held if slot.payload is not None]
            batch = self._by_arrival(held, ready, step)
        settled = len(batch) == self.groups_per_step and all(slot.outcome is not None for slot in batch)
        return batch if settled else None

    def _by_arrival(
        self, held: Sequence[_Slot[Payload]], ready: Sequence[_Slot[Payload]], step: int
    ) -> list[_Slot[Payload]]:
        """First the groups that must train now, else a later step would have more than N to train; then by arrival."""
        size, batch = self.groups_per_step, []
        oldest_first = sorted(ready, key=lambda slot: (slot.step, slot.arrival))
        for ahead in range(self.max_staleness + 1):
            # Groups that may train in step + ahead at the latest, and how many of them exceed the steps until then.
            due = [slot for slot in held if slot.step + self.max_staleness <= step + ahead]
            must = len(due) - size * ahead - sum(slot in batch for slot in due)
            choice = [slot for slot in oldest_first if slot in due and slot not in batch][: max(0, must)]
            if len(choice) < must:
                return []  # a group that must train now is not ready
            batch += choice
        rest = sorted((slot for slot in ready if slot not in batch), key=lambda slot: slot.arrival)
        return (batch + rest)[:size]

    def _slot(self, group_id: int) -> _Slot[Payload]:
        if group_id not in self._by_group:
            raise ValueError(f"group {group_id} is not in the buffer")
        return self._by_group[group_id]


def _reasons(slots: Iterable[_Slot[Payload]]) -> dict[int, str]:
    return {slot.group_id: slot.outcome.why for slot in slots if isinstance(slot.outcome, Failed)}
