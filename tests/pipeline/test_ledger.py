"""The ledger refuses impossible histories and is cut back exactly on resume."""

import json

import pytest

from stage_ray.errors import RunError
from stage_ray.pipeline.ledger import Ledger


def test_a_group_cannot_be_trained_twice(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for event in ("admitted", "generated", "scored", "trained"):
        ledger.note(event, [5], step=0)
    with pytest.raises(RunError, match="group 5 cannot be trained after nothing"):
        ledger.note("trained", [5], step=1)


def test_resuming_forgets_what_happened_after_the_checkpoint(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for event in ("admitted", "generated", "scored", "trained"):
        ledger.note(event, [0, 1], step=0, policy_version=0)
    kept = ledger.position()
    ledger.note("admitted", [2], step=1)
    ledger.close()
    again = Ledger(path, keep_bytes=kept)
    assert again.open_groups() == {} and path.read_text().count('"trained"') == 2
    again.note("admitted", [2], step=1)
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [e["group_id"] for e in events if e["event"] == "admitted"] == [0, 1, 2]
    assert set(events[0]) == {"event", "group_id", "policy_version", "step", "time"}


def test_what_happened_after_the_checkpoint_stays_until_the_run_goes_on(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.note("admitted", [0], step=0)
    kept = ledger.position()
    ledger.note("generated", [0], step=0)
    ledger.close()
    whole = path.read_bytes()
    again = Ledger(path, keep_bytes=kept)
    assert again.open_groups() == {0: "admitted"} and again.position() == kept
    again.close()
    assert path.read_bytes() == whole
    again = Ledger(path, keep_bytes=kept)
    again.note("dropped", [0], step=0)
    again.close()
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["admitted", "dropped"]


def test_a_ledger_shorter_than_its_checkpoint_says_is_an_error(tmp_path):
    with pytest.raises(RunError, match="shorter than its checkpoint"):
        Ledger(tmp_path / "ledger.jsonl", keep_bytes=10)
