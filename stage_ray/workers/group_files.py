"""Groups on disk: one safetensors file each, tokens and scores without pictures. For checkpoints and for replay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stage_ray.errors import RunError
from stage_ray.records import Prompt, RolloutGroup, ScoredGroup

ARRAYS = ("tokens", "logprobs", "guided_logprobs", "entropy")
METADATA = ("group_id", "policy_version", "worker", "generate_s")


def group_file(directory: Path, group_id: int) -> Path:
    """Where a group lies in a directory of groups."""
    return directory / f"group-{group_id:08d}.safetensors"


def save_group(directory: Path, group: RolloutGroup, scored: ScoredGroup) -> Path:
    """Write a scored group, without its pictures; the file.

    Example:
        >>> import tempfile
        >>> row = np.zeros((1, 2), np.float32)
        >>> pictures = np.zeros((1, 0, 0, 3), np.uint8)
        >>> group = RolloutGroup(3, Prompt(0, "x"), (7,), row.astype(np.int32), row, row, row, pictures, 5, "w", 0.1)
        >>> scored = ScoredGroup(3, ("s",), np.ones((1, 1), np.float32), np.ones((1, 1), bool), ({},), 0.0)
        >>> load_group(save_group(Path(tempfile.mkdtemp()), group, scored))[0].policy_version
        5
    """
    arrays = {name: np.ascontiguousarray(getattr(group, name)) for name in ARRAYS}
    arrays |= {"scores": np.ascontiguousarray(scored.scores), "valid": np.ascontiguousarray(scored.valid)}
    prompt = group.prompt
    said = {
        **{name: getattr(group, name) for name in METADATA},
        "prompt": {"index": prompt.index, "text": prompt.text, "record": dict(prompt.record)},
        "seeds": list(group.seeds),
        "names": list(scored.names),
        "details": [dict(detail) for detail in scored.details],
        "score_s": scored.score_s,
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = group_file(directory, group.group_id)
    save_file(arrays, path, metadata={"group": json.dumps(said)})
    return path


def load_group(path: Path) -> tuple[RolloutGroup, ScoredGroup]:
    """Read what `save_group` wrote; the pictures are empty.

    Raises:
        RunError: the file is missing, damaged, or holds no group.
    """
    try:
        with safe_open(path, "numpy") as file:
            said = json.loads((file.metadata() or {})["group"])
            arrays = {name: file.get_tensor(name) for name in (*ARRAYS, "scores", "valid")}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path} holds no recorded group that can be read: {error}") from error
    seeds = tuple(said["seeds"])
    group = RolloutGroup(
        prompt=Prompt(**said["prompt"]),
        seeds=seeds,
        images=np.empty((len(seeds), 0, 0, 3), np.uint8),
        **{name: said[name] for name in METADATA},
        **{name: arrays[name] for name in ARRAYS},
    )
    scored = ScoredGroup(
        group_id=group.group_id,
        names=tuple(said["names"]),
        scores=arrays["scores"],
        valid=arrays["valid"],
        details=tuple(said["details"]),
        score_s=said["score_s"],
    )
    return group, scored
