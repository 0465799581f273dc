"""The audit of a ledger finds every group that was lost, repeated, too old or out of order."""

import pytest

from stage_ray.pipeline.ledger import Ledger
from tests.audit import Audit, audit, read_ledger


def history(*groups: int, step: int = 0, version: int | None = None, last: str = "trained") -> list[dict]:
    """Groups that were admitted and trained in one step, or came as far as ``last``."""
    version = step if version is None else version
    names = ("admitted", "generated", "scored", "trained")
    rows = [(name, group) for name in names[: names.index(last) + 1] for group in groups]
    versions = {"admitted": None}
    return [
        {"event": name, "group_id": group, "step": step, "policy_version": versions.get(name, version)}
        for name, group in rows
    ]


def of_two(events: list[dict], staleness: int = 0, held: tuple[int, ...] | None = None) -> Audit:
    return audit(events, groups_per_step=2, max_staleness=staleness, held=held)


def test_an_audit_counts_groups_and_finds_nothing_wrong_with_a_sound_run():
    again = [{"event": "reissued", "group_id": 4, "step": 2, "policy_version": None}]
    found = of_two(history(0, 1) + history(2, 3, step=1) + history(4, 5, step=2, last="admitted") + again)
    assert found.sound
    assert (found.steps, found.admitted, found.scored, found.trained, found.dropped) == (2, 6, 4, 4, 0)
    assert (found.reissued, found.open) == (1, (4, 5))


def test_an_audit_agrees_with_the_ledger_that_was_cut_back_and_ignores_half_a_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for row in history(0, 1):
        ledger.note(row["event"], [row["group_id"]], step=row["step"], policy_version=row["policy_version"])
    kept = ledger.position()
    ledger.note("admitted", [2, 3], step=1)
    ledger.close()
    Ledger(path, keep_bytes=kept).note("admitted", [2, 3], step=1)
    with path.open("a") as file:
        file.write('{"event": "gene')
    found = of_two(read_ledger(path))
    assert found.sound and (found.trained, found.open) == (2, (2, 3))


def test_an_audit_finds_a_group_that_was_trained_twice():
    found = of_two(history(0, 1) + history(1, 2, step=1))
    assert found.repeated == (1,) and not found.sound
    assert any("group 1 was admitted after trained" in fault for fault in found.faults)


def test_an_audit_finds_a_group_that_can_train_no_more():
    waiting = history(2, last="scored")
    assert of_two(history(0, 1) + waiting, staleness=1).lost == ()
    assert of_two(history(0, 1) + waiting, staleness=0).lost == (2,)
    assert of_two(history(0, 1) + waiting + history(3, 4, step=1, version=0), staleness=1).lost == (2,)


def test_an_audit_finds_a_group_that_was_skipped_or_that_the_last_checkpoint_does_not_hold():
    assert of_two(history(0, 1) + history(3, 4, step=1)).lost == (2,)
    waiting = history(0, 1) + history(2, 3, step=1, last="scored")
    assert of_two(waiting, held=(2, 3)).lost == ()
    assert of_two(waiting, held=(2,)).lost == (3,)


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        (history(0, 1, step=1) + history(2, 3, step=0), "steps were trained in the order [1, 1, 0, 0]"),
        (history(0, 1) + history(2, 3, step=2), "step 1 trained 0 groups instead of 2"),
        (history(0) + history(1, 2, step=1), "step 0 trained 1 groups instead of 2"),
        (history(0, 1, step=1, version=0), "group 0 was 1 versions old in step 1, the bound is 0"),
        (history(0, 1, version=1), "group 0 was -1 versions old"),
        (history(0, 1, last="scored")[2:], "group 0 was generated after nothing"),
    ],
)
def test_an_audit_names_what_is_out_of_order(events, fault):
    assert any(fault in found for found in of_two(events).faults)


def test_a_kill_may_cut_the_last_step_short():
    assert of_two(history(0, 1) + history(2, 3, step=1)[:-1], held=(3,)).sound
