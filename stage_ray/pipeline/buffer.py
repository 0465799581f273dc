"""The experience buffer: slots for groups, and the rule that bounds staleness by construction.

A plain asyncio state machine over opaque references: no Ray, no payload, no tensor.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Literal, TypeVar

Payload = TypeVar("Payload")


@dataclass(frozen=True, slots=True)
class Failed:
    """The outcome of a group that is not to be trained; ``why`` in one sentence."""

    why: str


def failures(outcomes: Iterable[tuple[int, object]]) -> dict[int, str]:
    """The groups among ``outcomes`` that failed, and why."""
    return {group_id: outcome.why for group_id, outcome in outcomes if isinstance(outcome, Failed)}


@dataclass(slots=True, eq=False)
class Slot(Generic[Payload]):
    """One group's stay in the buffer; it keeps its outcome when the group has left."""

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
    by its last step. With N = 2 and k = 0 the third group waits until the first two are trained, not only taken.
    """

    def __init__(
        self, groups_per_step: int, max_staleness: int, order: Literal["strict", "arrival"] = "strict"
    ) -> None:
        self.groups_per_step, self.max_staleness, self._order = groups_per_step, max_staleness, order
        self.capacity = groups_per_step * (max_staleness + 1)
        self._slots: dict[int, Slot[Payload]] = {}  # by group, in the order of admission
        # How many groups are not taken, and how many of these are ready, by `Slot.step`: kept up to date, so that it
        # costs no look at every group to see that there is no batch yet.
        self._held, self._ready = Counter[int](), Counter[int]()
        self._arrivals = 0
        self._changed = asyncio.Event()

    @property
    def free(self) -> int:
        """Slots into which a group may be admitted now."""
        return self.capacity - len(self._slots)

    @property
    def waiting(self) -> int:
        """Groups that are ready and not yet taken."""
        return self._ready.total()

    @property
    def pending(self) -> int:
        """Groups that are being generated or scored."""
        return sum(slot.outcome is None for slot in self._slots.values())

    @property
    def failed(self) -> dict[int, str]:
        """Groups that failed and were not replaced yet, and why, in the order of slots."""
        return failures((slot.group_id, slot.outcome) for slot in self._slots.values())

    def admit(self, group_id: int, step: int) -> None:
        """Give a new group the next slot, ``step`` updates into the run.

        Raises:
            ValueError: no slot is free, or the group has one already.
        """
        if self.free <= 0:
            raise ValueError(f"group {group_id} cannot be admitted: all {self.capacity} slots are held")
        if group_id in self._slots:
            raise ValueError(f"group {group_id} is in the buffer already")
        self._slots[group_id] = Slot(group_id, step)
        self._count(self._slots[group_id], 1)

    def ready(self, group_id: int, payload: Payload, policy_version: int) -> None:
        """A group is generated and scored: it may be trained. Its version may be newer than when it was admitted."""
        self._arrivals += 1
        with self._changing(group_id) as slot:
            slot.arrival, slot.step, slot.outcome = self._arrivals, max(slot.step, policy_version), payload
        self._changed.set()

    def fail(self, group_id: int, why: str) -> None:
        """A group is not to be trained. It keeps its slot until it is replaced."""
        with self._changing(group_id) as slot:
            slot.outcome = Failed(why)
        self._changed.set()

    def replace(self, group_id: int, successor: int) -> None:
        """Give the slot of a failed group, and so its place in the order, to a fresh one."""
        fresh: Slot[Payload] = Slot(successor, self._slots[group_id].step)
        self._count(self._slots[group_id], -1)
        self._count(fresh, 1)
        slots = [fresh if slot.group_id == group_id else slot for slot in self._slots.values()]
        self._slots = {slot.group_id: slot for slot in slots}

    def invalidate(self, group_id: int) -> bool:
        """Forget the lost payload of a group, which keeps its slot to be generated again; whether it had one."""
        with self._changing(group_id) as slot:
            had_payload = slot.payload is not None
            if had_payload:
                slot.outcome, slot.taken = None, False
        return had_payload

    def requeue(self, group_ids: Iterable[int]) -> None:
        """Undo `take`: the groups were not trained, and keep their places in the order."""
        for group_id in group_ids:
            with self._changing(group_id) as slot:
                slot.taken = False
        self._changed.set()

    async def take(self, step: int) -> list[tuple[int, Payload | Failed]]:
        """The N groups of update ``step`` (0-based), once all have an outcome; `free_slots` frees their slots later.

        Where some failed none is taken: `replace` these, and take again.
        """
        while (batch := self._batch(step)) is None:
            await self._change()
        ready = all(slot.payload is not None for slot in batch)
        for slot in batch:
            with self._changing(slot.group_id):
                slot.taken = ready
        return [(slot.group_id, slot.outcome) for slot in batch if slot.outcome is not None]

    def held(self) -> list[Slot[Payload]]:
        """The slots of all groups that are not taken, in their order."""
        return [slot for slot in self._slots.values() if not slot.taken]

    async def outcomes(self, slots: Iterable[Slot[Payload]]) -> dict[int, Payload | Failed]:
        """Payload or failure of each group of `held`, once all have one, whatever became of their slots meanwhile."""
        slots = list(slots)
        while True:
            known = {slot.group_id: slot.outcome for slot in slots if slot.outcome is not None}
            if len(known) == len(slots):
                return known
            await self._change()

    def free_slots(self, group_ids: Iterable[int]) -> None:
        """Free the slots of groups, which are trained now.

        Raises:
            ValueError: a group was not taken.
        """
        for group_id in group_ids:
            if not self._slots[group_id].taken:
                raise ValueError(f"group {group_id} was never taken, so it cannot have been trained")
            del self._slots[group_id]
        self._held, self._ready = +self._held, +self._ready  # without the steps of which none is left

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    @contextmanager
    def _changing(self, group_id: int) -> Iterator[Slot[Payload]]:
        """A slot, counted again after what is done to it."""
        slot = self._slots[group_id]
        self._count(slot, -1)
        yield slot
        self._count(slot, 1)

    def _count(self, slot: Slot[Payload], by: int) -> None:
        if not slot.taken:
            self._held[slot.step] += by
            self._ready[slot.step] += by * (slot.payload is not None)

    def _batch(self, step: int) -> list[Slot[Payload]] | None:
        """The slots of an update, if there are N and all are settled."""
        if self._order == "arrival":
            return self._batch_of_arrivals(step)
        batch = list(islice((slot for slot in self._slots.values() if not slot.taken), self.groups_per_step))
        settled = len(batch) == self.groups_per_step and all(slot.outcome is not None for slot in batch)
        return batch if settled else None

    def _batch_of_arrivals(self, step: int) -> list[Slot[Payload]] | None:
        """First the groups that must train now, else a later step would have more than N to train; then by arrival."""
        musts = 0
        for ahead in range(self.max_staleness + 1):
            # Their last step is step + ahead at the latest; those that the next `ahead` steps cannot take go now.
            due, ready = (
                sum(number for born, number in counts.items() if born + self.max_staleness <= step + ahead)
                for counts in (self._held, self._ready)
            )
            musts += max(0, due - musts - self.groups_per_step * ahead)
            if ready < musts:
                return None  # a group that must train now is not ready
        if self.waiting < self.groups_per_step:
            return None
        arrived = sorted((slot for slot in self.held() if slot.payload is not None), key=lambda slot: slot.arrival)
        oldest = sorted(arrived, key=lambda slot: slot.step)[:musts]  # of one age by arrival: sorting is stable
        chosen = {slot.group_id for slot in oldest}
        # A checkpoint's group may be newer than it: one that was lost meanwhile and generated again.
        rest = [slot for slot in arrived if slot.group_id not in chosen and slot.step <= step]
        batch = (oldest + rest)[: self.groups_per_step]
        return batch if len(batch) == self.groups_per_step else None
