"""Groups on disk: one safetensors file each, tokens and scores without pictures. For checkpoints and for replay."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stage_ray.errors import RunError
from stage_ray.records import Prompt, RolloutGroup, ScoredGroup

FEATURES = "features/"  # before a scorer's name: its features of the images


def group_file(directory: Path, group_id: int) -> Path:
    """Where a group lies in a directory of groups."""
    return directory / f"group-{group_id:08d}.safetensors"


def save_group(directory: Path, group: RolloutGroup, scored: ScoredGroup) -> None:
    """Write a scored group, without its pictures."""
    values = {field.name: getattr(record, field.name) for record in (group, scored) for field in fields(record)}
    del values["images"]
    values["prompt"] = asdict(group.prompt)
    values |= {FEATURES + name: features for name, features in values.pop("features").items()}
    arrays = {name: np.ascontiguousarray(value) for name, value in values.items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in values.items() if name not in arrays}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(arrays, group_file(directory, group.group_id), metadata={"group": json.dumps(plain)})


def load_group(path: Path) -> tuple[RolloutGroup, ScoredGroup]:
    """Read what `save_group` wrote; the pictures are empty.

    Raises:
        RunError: the file is missing, damaged, or holds no group.
    """
    try:
        with safe_open(path, "numpy") as file:
            values: dict[str, Any] = json.loads((file.metadata() or {})["group"])
            values |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        values["prompt"] = Prompt(**values["prompt"])
        values["images"] = np.empty((len(values["seeds"]), 0, 0, 3), np.uint8)
        # An earlier version did not record it; none of its recipes reads it.
        values.setdefault("guided_entropy", np.zeros_like(values["entropy"]))
        values.setdefault("unasked", ())
        values.setdefault("guided", True)
        values.setdefault("embeds", None)
        values["features"] = {
            name.removeprefix(FEATURES): array for name, array in values.items() if name.startswith(FEATURES)
        }
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        # Both records have a group_id; apart from that the names of their fields differ.
        group = RolloutGroup(**{field.name: values[field.name] for field in fields(RolloutGroup)})
        scored = ScoredGroup(**{field.name: values[field.name] for field in fields(ScoredGroup)})
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path} holds no recorded group that can be read: {error}") from error
    return group, scored
