"""A group on disk comes back as it was, pictures apart; one of an earlier version can still be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from stage_ray.errors import RunError
from stage_ray.records import RECORDED, Prompt, RolloutGroup, ScoredGroup
from stage_ray.workers.group_files import group_file, load_group, save_group

RECORDS = {name: np.full((2, 3), number, np.float32) for number, name in enumerate(RECORDED)}
GROUP = RolloutGroup(
    group_id=4,
    prompt=Prompt(1, "two rings", {"tag": "counting"}, "prompts.jsonl, line 2"),
    seeds=(5, 6),
    tokens=np.arange(6, dtype=np.int32).reshape(2, 3),
    **RECORDS,
    images=np.ones((2, 4, 4, 3), np.uint8),
    policy_version=7,
    worker="rollout-0",
    generate_s=0.5,
)
SCORES = np.array([[0.5, 1.0], [0.25, 0.0]], np.float32)
SCORED = ScoredGroup(4, ("clip", "dino"), SCORES, np.ones((2, 2), bool), ({"clip": {"verdict": True}}, {}), 0.1)
FEATURES = {"dino": np.arange(8, dtype=np.float32).reshape(2, 4)}


def test_a_group_comes_back_with_its_records_and_features(tmp_path: Path) -> None:
    embeds = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    save_group(tmp_path, replace(GROUP, guided=False, embeds=embeds), replace(SCORED, features=FEATURES))
    group, scored = load_group(group_file(tmp_path, 4))
    assert (group.prompt, group.prompt.where, group.seeds) == (GROUP.prompt, GROUP.prompt.where, (5, 6))
    assert group.images.shape == (2, 0, 0, 3) and not group.guided
    np.testing.assert_array_equal(group.embeds, embeds)
    for name, values in RECORDS.items():
        np.testing.assert_array_equal(getattr(group, name), values)
    np.testing.assert_array_equal(scored.scores, SCORES)
    assert scored.details == SCORED.details and scored.features.keys() == FEATURES.keys()
    np.testing.assert_array_equal(scored.features["dino"], FEATURES["dino"])


def test_a_group_of_an_earlier_version_has_no_guided_entropy_and_no_features(tmp_path: Path) -> None:
    save_group(tmp_path, GROUP, SCORED)
    path = group_file(tmp_path, 4)
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys() if name != "guided_entropy"}  # noqa: SIM118
        plain = json.loads(file.metadata()["group"])
    del plain["guided"]
    save_file(arrays, path, metadata={"group": json.dumps(plain)})
    group, scored = load_group(path)
    assert not group.guided_entropy.any() and group.guided_entropy.shape == (2, 3) and not scored.features
    assert group.guided


@pytest.mark.parametrize("metadata", [{}, {"group": json.dumps({"seeds": [1]})}])
def test_a_file_that_holds_no_group_is_named(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file({"tokens": np.zeros((1, 2), np.int32)}, tmp_path / "other.safetensors", metadata=metadata)
    with pytest.raises(RunError, match=r"other.safetensors holds no recorded group"):
        load_group(tmp_path / "other.safetensors")
