"""What is done of an evaluation, on disk as it comes: one that was interrupted goes on there, draws nothing twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np

from stage_ray.errors import ConfigError, RunError
from stage_ray.evaluation.base import plain
from stage_ray.records import ScoredGroup


class PartialResult:
    """The scored groups of an evaluation that is under way, as JSON Lines: its inputs, then one group a line.

    Invariant: all groups of the file were drawn and scored with these inputs. A last line that a kill cut short does
    not count. A group with a score that failed is not written, so that an evaluation that goes on scores it again.

    Attributes:
        groups: ``group_id`` -> its scores.

    Example:
        partial = PartialResult(Path("after.json.partial"), {"--seed": 20})
        partial.add(scored)  # once for each group
        partial.remove()  # the result is written
    """

    def __init__(self, path: Path | None = None, inputs: Mapping[str, Any] | None = None) -> None:
        """Read what is there; nothing is written before the first `add`, and never without a ``path``.

        Args:
            path: the file, or None.
            inputs: all that the scores depend on, by the names that a user knows; JSON-able.

        Raises:
            ConfigError: the file was begun with other inputs; names the first that differs, old and new.
            RunError: the file is damaged.
        """
        self.groups: dict[int, ScoredGroup] = {}
        self._path, self._inputs = path, json.loads(json.dumps(inputs or {}))
        self._file: TextIOWrapper | None = None
        self._whole_bytes = 0  # of the lines that count
        if path is not None and path.is_file():
            self._read(path)

    def add(self, group: ScoredGroup) -> None:
        """Keep a group."""
        self.groups[group.group_id] = group
        if self._path is not None and group.valid[:, group.asked].all():
            self._file = self._file or self._begin(self._path)
            scores = {"scores": group.scores.tolist(), "details": group.details, "score_s": group.score_s}
            line = {"group_id": group.group_id, "names": group.names, "unasked": group.unasked, **scores}
            if group.features:
                line["features"] = {name: array.tolist() for name, array in group.features.items()}
            self._file.write(json.dumps(line, default=plain) + "\n")
            self._file.flush()

    def remove(self) -> None:
        """Remove the file: the evaluation is done."""
        if self._file is not None:
            self._file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _begin(self, path: Path) -> TextIOWrapper:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
        os.truncate(path, self._whole_bytes)
        if not self._whole_bytes:
            file.write(json.dumps({"inputs": self._inputs}) + "\n")
        return file

    def _read(self, path: Path) -> None:
        whole, end, _ = path.read_bytes().rpartition(b"\n")
        self._whole_bytes = len(whole + end)
        if not whole:
            return
        try:
            first, *lines = [json.loads(line) for line in whole.split(b"\n")]
            began = dict(first["inputs"])
            self.groups = {line["group_id"]: _group(line) for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error!r}); remove it to begin anew") from error
        for key in [*self._inputs, *began]:
            if (old := began.get(key)) != (new := self._inputs.get(key)):
                raise ConfigError(
                    f"{path} holds a part of another evaluation: {key} was {old!r} and is {new!r} now; use the same "
                    "value to go on with it, or write to another place"
                )


def _group(line: Mapping[str, Any]) -> ScoredGroup:
    details, names = tuple(line["details"]), tuple(line["names"])
    scores = np.asarray(line["scores"], np.float32).reshape(len(details), len(names))
    unasked = tuple(line.get("unasked", ()))
    valid = np.isfinite(scores)  # all but those of scorers that were not asked
    features = {name: np.asarray(rows, np.float32) for name, rows in line.get("features", {}).items()}
    return ScoredGroup(line["group_id"], names, scores, valid, details, line["score_s"], features, unasked)
