"""The doctor tells what is there, what is lacking, and what to do about it."""

import io

import pytest
from rich.console import Console

from stage_ray.commands import doctor


def diagnose(monkeypatch: pytest.MonkeyPatch, *findings: doctor.Finding) -> tuple[bool, str]:
    monkeypatch.setattr(doctor, "CHECKS", (lambda: findings,))
    out = io.StringIO()
    return doctor.examine(Console(file=out, width=160)), out.getvalue()


def test_one_thing_missing_is_enough_to_say_no_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = doctor.Finding("Python", "ok", "3.12.4")
    lacking = doctor.Finding("ray", "missing", "not installed", doctor.REINSTALL)
    able, shown = diagnose(monkeypatch, fine, lacking)
    assert not able
    assert "missing  ray     not installed  run: make install" in shown
    assert "cannot run here yet: ray." in shown


def test_a_note_does_not_stand_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    able, shown = diagnose(monkeypatch, doctor.Finding("CPU", "note", "1 core", "expect twice the time"))
    assert able and "The default job can run here" in shown


def test_a_library_that_is_installed_but_broken_is_found_out() -> None:
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    finding = doctor._imports("torchvision", "numpy", broken, fix="remove it")
    assert (finding.state, finding.fix) == ("missing", "remove it")
    assert finding.found.endswith("it does not import: RuntimeError: operator torchvision::nms does not exist")


def test_a_library_that_is_not_installed_is_missing() -> None:
    assert doctor._imports("nothing", "no-such-distribution").found == "not installed"


def test_a_variable_that_leaves_no_room_for_rays_sockets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{60 * 'x'}")
    (found,) = [finding for finding in doctor._space() if finding.subject == "Ray's files"]
    assert (found.state, found.fix) == ("missing", "set RAY_TMPDIR") and "RAY_TMPDIR = '/tmp/xxx" in found.found


@pytest.mark.slow
def test_what_make_install_leaves_can_run_the_default_job() -> None:
    out = io.StringIO()
    assert doctor.examine(Console(file=out, width=160)), out.getvalue()
