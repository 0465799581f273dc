"""An independent count of a ledger's history: the proof that no group was lost or trained twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from stage_ray.pipeline.ledger import FOLLOWS, Event


@dataclass(frozen=True, slots=True)
class Audit:
    """What a ledger says of a run, counted without the ledger's own state.

    Attributes:
        steps: updates with all their groups.
        admitted, scored, trained, dropped: groups.
        reissued: times that a group was given to another worker, because the one that drew it was lost.
        open: groups that are neither trained nor dropped: on their way, if nothing is wrong with them.
        lost: groups that can never be trained any more and were not dropped with a reason either.
        repeated: groups that were trained more than once.
        faults: everything else that breaks a rule (order of events, of steps, staleness), one sentence each.

    Example:
        >>> events = [{"event": e, "group_id": 0, "step": 0, "policy_version": 0} for e in ("admitted", "generated")]
        >>> found = audit(events, groups_per_step=1, max_staleness=0)
        >>> found.open, found.lost, found.sound
        ((0,), (), True)
    """

    steps: int
    admitted: int
    scored: int
    trained: int
    dropped: int
    reissued: int
    open: tuple[int, ...]
    lost: tuple[int, ...]
    repeated: tuple[int, ...]
    faults: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether no group was lost, none trained twice, and no rule broken."""
        return not (self.lost or self.repeated or self.faults)


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The events of a ledger; a last line that was cut by a kill is left out, as a resume cuts it off.

    Raises:
        ValueError: another line is not JSON.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last line's end is empty, or half a line


def audit(
    events: Iterable[Mapping[str, Any]],
    *,
    groups_per_step: int,
    max_staleness: int,
    held: Collection[int] | None = None,
) -> Audit:
    """Go through a run's history again and count.

    A resume, and the rewind after a learner's death, cut the ledger back to the byte that a checkpoint names. So it is
    one history without detours, and shows a group twice only if something is wrong; what the checkpoint had on its way
    is open at the cut and goes on after it. That the weights agree with this history cannot be seen here: compare
    ``steps`` with the learner's version, and the trained groups with those that ``pipeline.record`` kept.

    Args:
        events: of `read_ledger`.
        groups_per_step: N of the run's config.
        max_staleness: k of the run's config. A group that may train no more in the step that comes next is lost.
        held: groups that the last checkpoint holds, for a run that has ended: an open group beside them is lost.
    """
    history = list(events)
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for event in history:
        groups.setdefault(event["group_id"], []).append(event)
    named = {name: {e["group_id"] for e in history if e["event"] == name} for name in get_args(Event)}
    trained = [event for event in history if event["event"] == "trained"]
    steps = sum(count >= groups_per_step for count in Counter(event["step"] for event in trained).values())
    times = Counter(event["group_id"] for event in trained)
    unfinished = named["admitted"] - named["trained"] - named["dropped"]
    missing = set(range(max(named["admitted"], default=-1) + 1)) - named["admitted"]
    late = {group for group in unfinished if _newest(groups[group]) + max_staleness < steps}
    stray = unfinished - set(held) if held is not None else set()
    return Audit(
        steps=steps,
        admitted=len(named["admitted"]),
        scored=len(named["scored"]),
        trained=len(named["trained"]),
        dropped=len(named["dropped"]),
        reissued=sum(event["event"] == "reissued" for event in history),
        open=tuple(sorted(unfinished)),
        lost=tuple(sorted(missing | late | stray)),
        repeated=tuple(sorted(group for group, count in times.items() if count > 1)),
        faults=(*_wrong_orders(groups), *_wrong_steps(trained, groups_per_step), *_wrong_ages(trained, max_staleness)),
    )


def _newest(events: Iterable[Mapping[str, Any]]) -> int:
    """The version from which a group ages: that of the step it was admitted in, or the newer one that drew it."""
    return max(event["step"] if event["event"] == "admitted" else event["policy_version"] or 0 for event in events)


def _wrong_orders(groups: Mapping[int, Iterable[Mapping[str, Any]]]) -> Iterable[str]:
    for group, events in groups.items():
        before: str | None = None
        for event in (e["event"] for e in events):
            if event not in FOLLOWS.get(before, ()):
                yield f"group {group} was {event} after {before or 'nothing'}"
            before = event


def _wrong_steps(trained: Iterable[Mapping[str, Any]], groups_per_step: int) -> Iterable[str]:
    """Steps come one after another from 0, with all their groups; a kill may cut the last one short."""
    order = [event["step"] for event in trained]
    if order != sorted(order):
        yield f"steps were trained in the order {order}"
    sizes = Counter(order)
    last = max(sizes, default=-1)
    for step in range(last + 1):
        if sizes[step] != groups_per_step and not (step == last and 0 < sizes[step] < groups_per_step):
            yield f"step {step} trained {sizes[step]} groups instead of {groups_per_step}"


def _wrong_ages(trained: Iterable[Mapping[str, Any]], max_staleness: int) -> Iterable[str]:
    for event in trained:
        age = event["step"] - event["policy_version"]
        if not 0 <= age <= max_staleness:
            group, step = event["group_id"], event["step"]
            yield f"group {group} was {age} versions old in step {step}, the bound is {max_staleness}"
