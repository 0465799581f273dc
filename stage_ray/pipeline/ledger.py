"""The ledger: what happened to every group, one line for each event. It refuses to lose one or to train one twice."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from stage_ray.errors import RunError
from stage_ray.files import flush_to_disk

Event = Literal["admitted", "generated", "scored", "trained", "dropped", "reissued"]

# What may follow what. A group ends as trained or dropped, once.
FOLLOWS: dict[str | None, set[str]] = {
    None: {"admitted"},
    "admitted": {"generated", "reissued", "dropped"},
    "reissued": {"generated", "reissued", "dropped"},
    "generated": {"scored", "reissued", "dropped"},
    "scored": {"trained", "reissued", "dropped"},
}


class Ledger:
    """Append-only ``ledger.jsonl`` and the state it implies.

    Invariant: every group's events follow `FOLLOWS`; a breach (a group trained twice, say) raises at once.
    """

    def __init__(self, path: Path, keep_bytes: int | None = None) -> None:
        """Open the ledger as it was at a checkpoint's ``position``, ``keep_bytes``; None: as it is.

        What comes after that is cut off by the first `note`, when the checkpoint has been loaded.

        Raises:
            RunError: the file is shorter than the checkpoint says.
        """
        path.touch()
        self._file = path.open("r+b")
        kept = self._file.read(-1 if keep_bytes is None else keep_bytes)  # the next write goes on from there
        if keep_bytes is not None and len(kept) < keep_bytes:
            self._file.close()
            raise RunError(f"{path} is shorter than its checkpoint says ({len(kept)} of {keep_bytes} bytes)")
        self._open: dict[int, str] = {}  # groups that are neither trained nor dropped -> their last event
        for line in kept.splitlines():
            event = json.loads(line)
            self._advance(event["event"], event["group_id"])

    def note(
        self, event: Event, group_ids: Iterable[int], *, step: int, policy_version: int | None = None, why: str = ""
    ) -> None:
        """Append one event for each group.

        Raises:
            RunError: the event cannot follow the group's last one.
        """
        now = round(time.time(), 3)
        self._file.truncate()  # here, where it is written on: only what a resumed run leaves behind comes after
        for group_id in group_ids:
            self._advance(event, group_id)
            record = {"event": event, "group_id": group_id, "policy_version": policy_version, "step": step, "time": now}
            self._file.write((json.dumps(record | ({"why": why} if why else {})) + "\n").encode())
        self._file.flush()

    def open_groups(self) -> dict[int, str]:
        """Groups that are neither trained nor dropped, with their last event, oldest first."""
        return dict(sorted(self._open.items()))

    def position(self) -> int:
        """Bytes written so far, and on disk: what a checkpoint stores to cut back to."""
        self._file.flush()
        flush_to_disk(self._file.fileno())  # a checkpoint that outlives a power cut must not be ahead of its ledger
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _advance(self, event: str, group_id: int) -> None:
        before = self._open.get(group_id)
        if event not in FOLLOWS[before]:
            raise RunError(f"ledger: group {group_id} cannot be {event} after {before or 'nothing'}")
        self._open[group_id] = event
        if event not in FOLLOWS:  # trained or dropped
            del self._open[group_id]
