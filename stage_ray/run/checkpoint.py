"""Checkpoints that are whole or absent (promise 7).

``step-000050/`` appears by one rename, after every file in it and a manifest with their xxh3 are on disk. What a
crash leaves behind has another name, and the next save removes it. Loading verifies every byte.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from stage_ray.files import FileDigest, sync_path

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT, READABLE = 2, (1, 2)
ALGORITHMS: dict[str, Callable[[], Any]] = {"xxh3": xxhash.xxh3_64, "sha256": hashlib.sha256}  # the latter: format 1
UNFINISHED = ".unfinished-"


class CheckpointError(RuntimeError):
    """A damaged checkpoint: one sentence names the file and the damage."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One verified checkpoint; ``step``: updates done when it was written."""

    step: int
    path: Path
    metadata: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints of one run, newest ``keep`` of them, and that of the best score. One writer at a time.

    Invariant: a directory named ``step-*`` was complete when it got that name.

    Attributes:
        scores: step -> how good its policy is, for the steps of which that is known; more is better.
    """

    def __init__(self, root: Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least the newest checkpoint must be kept")
        self.root, self.keep = root, keep
        self.scores: Mapping[int, float] = {}

    def path(self, step: int) -> Path:
        """The directory of a step's checkpoint."""
        return self.root / f"step-{step:06d}"

    def begin(self, step: int) -> Path:
        """An empty directory to fill and `finish`, or to remove; removes what earlier crashes left behind.

        Its name is unique: the learner of a killed driver may still be writing into an older one.
        """
        self._remove_unfinished()
        unfinished = self.root / f"{UNFINISHED}step-{step:06d}-{uuid.uuid4().hex}"
        unfinished.mkdir(parents=True)
        return unfinished

    def finish(
        self, step: int, directory: Path, metadata: Mapping[str, Any], written: Mapping[str, FileDigest] | None = None
    ) -> Path:
        """Give a filled directory of `begin` its final name, in place of an older checkpoint of this step, and `prune`.

        Args:
            metadata: JSON data.
            written: what the learner wrote, by path in ``directory``. It is not read again, but must be there.

        Raises:
            OSError: the disk, or a file that is not as it was written; older checkpoints are untouched.
        """
        files = {name: asdict(file) for name, file in _files(directory, written or {}).items()}
        body = {"format": FORMAT, "step": step, "metadata": dict(metadata), "files": files}
        text = json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True)
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
        for path in (*directory.rglob("*"), directory):
            sync_path(path)
        final = self.path(step)
        if final.exists():  # a directory cannot be renamed onto another
            os.rename(final, self.root / f"{UNFINISHED}replaced-{final.name}-{uuid.uuid4().hex}")
        os.rename(directory, final)
        sync_path(self.root)
        self._remove_unfinished()
        self.prune(step)
        return final

    def prune(self, step: int) -> None:
        """Keep the newest and the best of those up to ``step``; later ones are damaged, and a resume skipped them."""
        best = self.best()
        for older, path in [found for found in self._steps() if found[0] <= step][: -self.keep]:  # all but the newest
            if older != best:
                shutil.rmtree(path)

    def best(self) -> int | None:
        """Step of the checkpoint with the best score, the first of equals; None where none has one."""
        return best_of({step: self.scores[step] for step, _ in self._steps() if step in self.scores})

    def latest(self, on_problem: Callable[[str], None] = log.warning) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None; ``on_problem`` is told of each damaged one."""
        for step, path in reversed(self._steps()):
            try:
                return Checkpoint(step, path, verify(path, step))
            except CheckpointError as error:
                on_problem(f"checkpoint skipped: {error}")
        return None

    def _steps(self) -> list[tuple[int, Path]]:
        """The checkpoints with their steps, oldest first."""
        found = [(path.name.removeprefix("step-"), path) for path in self.root.glob("step-*") if path.is_dir()]
        return sorted((int(digits), path) for digits, path in found if digits.isdigit())

    def _remove_unfinished(self) -> None:
        for leftover in self.root.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover, ignore_errors=True)  # one that is still written into goes the next time


def best_of(scores: Mapping[int, float]) -> int | None:
    """The step with the best score, the first of equals; None without any.

    Example:
        >>> best_of({1: 0.5, 2: 0.7, 3: 0.7})
        2
    """
    return max(sorted(scores), key=scores.__getitem__, default=None)


def verify(path: Path, step: int) -> dict[str, Any]:
    """Check every byte of a checkpoint and return its metadata.

    Raises:
        CheckpointError: no manifest, a manifest that was changed, or a file that is missing, short or changed.
    """
    manifest = path / MANIFEST
    try:
        body = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST}") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{manifest} cannot be read: {error}") from error
    if not isinstance(body, dict) or body.pop("checksum", None) != _checksum(body):  # of all but itself
        raise CheckpointError(f"{manifest} does not match its own checksum; it was changed or cut")
    if body["format"] not in READABLE:
        raise CheckpointError(f"{manifest} has format {body['format']}, this version reads formats up to {FORMAT}")
    if body["step"] != step:
        raise CheckpointError(f"{path} says it is of step {body['step']}")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: _verify_file(path / name, **body["files"][name]), body["files"]))
    return dict(body["metadata"])


def _verify_file(file: Path, *, bytes: int, **expected: str) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    if (size := file.stat().st_size) != bytes:
        raise CheckpointError(f"{file} has {size} bytes instead of {bytes}; it is truncated or changed")
    (algorithm,) = expected
    if _digest(file, algorithm) != expected[algorithm]:
        raise CheckpointError(f"{file} has another {algorithm} than its manifest says; its bytes changed")


def _files(directory: Path, written: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
    """Every file below a directory, by path; only those are read whose writer has not told their digests."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            name, size = path.relative_to(directory).as_posix(), path.stat().st_size
            found[name] = written[name] if name in written else FileDigest(size, _digest(path, "xxh3"))
            if size != found[name].bytes:
                raise OSError(f"{path} has {size} bytes, and {found[name].bytes} were written")
    if lacking := sorted(written.keys() - found.keys()):
        gone = directory / lacking[0]
        raise OSError(f"{gone} was written and is not here: is run_dir on storage that all nodes share?")
    return found


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as stream:
        return str(hashlib.file_digest(stream, ALGORITHMS[algorithm]).hexdigest())  # other threads run meanwhile
