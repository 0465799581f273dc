from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stage_ray.files import FileDigest
from stage_ray.run import checkpoint
from stage_ray.run.checkpoint import CheckpointError, CheckpointStore, verify


def writer(text: str) -> Callable[[Path], None]:
    """Writes a file and one in a subdirectory."""

    def write(directory: Path) -> None:
        (directory / "state.bin").write_text(text * 100)
        (directory / "learner").mkdir()
        (directory / "learner" / "weights.bin").write_text(text)

    return write


def save(store: CheckpointStore, step: int, write: Callable[[Path], None], metadata: dict[str, Any]) -> None:
    """As a run does, with the learner's part in it."""
    directory = store.begin(step)
    try:
        write(directory)
        store.finish(step, directory, metadata)
    except BaseException:
        shutil.rmtree(directory)
        raise


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    save(store, 1, writer("one"), {"cursor": 1})
    save(store, 2, writer("two"), {"cursor": 2})
    return store


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.root.iterdir())


def latest(store: CheckpointStore) -> tuple[int | None, list[str]]:
    """Step of the newest sound checkpoint, and what was said of the others."""
    problems: list[str] = []
    found = store.latest(problems.append)
    return (found.step if found else None), problems


def test_the_newest_checkpoint_is_found_with_its_files_and_metadata(store: CheckpointStore) -> None:
    found = store.latest()
    assert found is not None
    assert (found.step, found.metadata) == (2, {"cursor": 2})
    assert (found.path / "learner" / "weights.bin").read_text() == "two"


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "nowhere", keep=1).latest() is None


def test_only_the_newest_are_kept(store: CheckpointStore) -> None:
    save(store, 30, writer("x"), {})
    assert names(store) == ["step-000002", "step-000030"]


def test_the_best_is_kept_beside_the_newest_until_another_one_is_better(store: CheckpointStore) -> None:
    store.scores = {1: 0.5, 2: 0.4, 3: 0.5, 9: 0.9}  # 9 was never saved
    for step in (3, 4, 5):
        save(store, step, writer(str(step)), {})
    assert names(store) == ["step-000001", "step-000004", "step-000005"] and store.best() == 1
    store.scores = {**store.scores, 5: 0.6}
    save(store, 6, writer("six"), {})
    assert names(store) == ["step-000005", "step-000006"] and store.best() == 5


def test_a_checkpoint_of_the_same_step_is_replaced(store: CheckpointStore) -> None:
    save(store, 2, writer("new"), {"cursor": 22})
    found = store.latest()
    assert found is not None and found.metadata == {"cursor": 22}
    assert names(store) == ["step-000001", "step-000002"]


def test_a_truncated_file_is_named_and_the_older_checkpoint_taken(store: CheckpointStore) -> None:
    file = store.root / "step-000002" / "state.bin"
    file.write_bytes(file.read_bytes()[:-1])
    step, problems = latest(store)
    assert step == 1
    assert len(problems) == 1 and "step-000002/state.bin has 299 bytes instead of 300" in problems[0]


def test_a_flipped_bit_is_named_and_the_older_checkpoint_taken(store: CheckpointStore) -> None:
    file = store.root / "step-000002" / "learner" / "weights.bin"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    step, problems = latest(store)
    assert step == 1
    assert "learner/weights.bin has another xxh3" in problems[0]


def write_sha256(store: CheckpointStore, step: int) -> Path:
    """Make a checkpoint's manifest what earlier versions wrote."""
    path = store.root / f"step-{step:06d}"
    body = json.loads((path / "manifest.json").read_text()) | {"format": 1}
    for name, file in body["files"].items():
        file["sha256"] = hashlib.sha256((path / name).read_bytes()).hexdigest()
        del file["xxh3"]
    del body["checksum"]
    body["checksum"] = checkpoint._checksum(body)
    (path / "manifest.json").write_text(json.dumps(body))
    return path


def test_a_checkpoint_of_before_with_sha256_is_verified_by_that(store: CheckpointStore) -> None:
    path = write_sha256(store, 2)
    assert latest(store) == (2, [])
    file = path / "state.bin"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    step, problems = latest(store)
    assert step == 1
    assert "state.bin has another sha256" in problems[0]


def test_what_the_learner_wrote_is_not_read_again_and_must_be_there(store: CheckpointStore) -> None:
    directory = store.begin(3)
    writer("three")(directory)
    known = FileDigest(5, "of its writer")
    store.finish(3, directory, {}, {"learner/weights.bin": known})
    files = json.loads((store.root / "step-000003" / "manifest.json").read_text())["files"]
    assert files["learner/weights.bin"] == {"bytes": 5, "xxh3": "of its writer"}
    assert latest(store)[0] == 2, "and it is verified by that"


@pytest.mark.parametrize(
    ("name", "message"),
    [("learner/weights.bin", "has 5 bytes, and 6 were written"), ("learner/other.bin", "is not here: is run_dir on")],
)
def test_a_checkpoint_that_lacks_what_the_learner_wrote_replaces_none(store, name: str, message: str) -> None:
    directory = store.begin(3)
    writer("three")(directory)
    with pytest.raises(OSError, match=f"{name} .*{message}"):
        store.finish(3, directory, {}, {name: FileDigest(6, "of its writer")})
    assert {"step-000001", "step-000002"} <= set(names(store))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "its own checksum"),
        (lambda path: (path / "state.bin").unlink(), "state.bin is missing"),
    ],
)
def test_other_damage_is_named(store: CheckpointStore, spoil: Callable[[Path], object], message: str) -> None:
    spoil(store.root / "step-000002")
    step, problems = latest(store)
    assert step == 1
    assert message in problems[0]


def test_metadata_that_was_edited_is_not_believed(store: CheckpointStore) -> None:
    file = store.root / "step-000002" / "manifest.json"
    body = json.loads(file.read_text())
    body["metadata"]["cursor"] = 3
    file.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="its own checksum"):
        verify(file.parent, 2)


def test_a_checkpoint_under_another_steps_name_is_not_believed(store: CheckpointStore) -> None:
    (store.root / "step-000002").rename(store.root / "step-000009")
    step, problems = latest(store)
    assert step == 1
    assert "says it is of step 2" in problems[0]


def test_when_none_is_sound_there_is_none(store: CheckpointStore) -> None:
    for path in store.root.iterdir():
        (path / "state.bin").unlink()
    step, problems = latest(store)
    assert step is None
    assert len(problems) == 2


def test_a_crash_in_the_middle_of_a_save_leaves_the_older_ones_and_no_rubbish(store: CheckpointStore) -> None:
    def crash(directory: Path) -> None:
        (directory / "half.bin").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save(store, 3, crash, {})
    assert names(store) == ["step-000001", "step-000002"]
    assert latest(store) == (2, [])


def test_what_a_killed_save_left_is_never_loaded_and_swept_by_the_next(store: CheckpointStore) -> None:
    leftover = store.root / ".unfinished-step-000003"
    leftover.mkdir()
    (leftover / "half.bin").write_text("half")
    assert latest(store) == (2, [])
    save(store, 4, writer("four"), {})
    assert names(store) == ["step-000002", "step-000004"]


def test_a_learner_that_outlives_its_driver_and_writes_on_disturbs_no_later_save(store, monkeypatch) -> None:
    orphaned, rmdir = store.begin(3), os.rmdir

    def just_before(path: Any, **options: Any) -> None:
        if Path(path).name == orphaned.name:
            (orphaned / "late.bin").write_text("late")
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", just_before)
    save(store, 3, writer("three"), {})
    assert latest(store) == (3, []) and not (store.root / "step-000003" / "late.bin").exists()
    monkeypatch.undo()
    save(store, 4, writer("four"), {})
    assert names(store) == ["step-000003", "step-000004"]


def test_older_checkpoints_go_only_after_the_new_one_is_complete(store: CheckpointStore) -> None:
    def look(directory: Path) -> None:
        assert {"step-000001", "step-000002"} <= set(names(store))
        (directory / "x").write_text("x")

    save(store, 3, look, {})
    assert names(store) == ["step-000002", "step-000003"]


def test_metadata_that_is_not_json_is_refused_before_anything_is_kept(store: CheckpointStore) -> None:
    with pytest.raises(TypeError):
        save(store, 3, writer("x"), {"bad": object()})
    assert names(store) == ["step-000001", "step-000002"]


def test_a_broken_later_checkpoint_does_not_push_sound_ones_out(store: CheckpointStore) -> None:
    (store.root / "step-000002" / "state.bin").unlink()
    save(store, 1, writer("again"), {})
    assert names(store) == ["step-000001", "step-000002"]
    assert latest(store)[0] == 1


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointStore(tmp_path, keep=0)
