"""`stage-ray gpu-check`: the frame with checks that fail, hang and die, and every real check with small shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from stage_ray.bench.gpu_check import command
from stage_ray.bench.gpu_check.base import Check
from stage_ray.bench.inputs import JANUS_PRO_1B, SHIPPED
from stage_ray.cli import main
from stage_ray.config.model_sizes import KNOWN
from stage_ray.config.paths import resolve_path
from stage_ray.policies.janus.builder import build_config, config_sizes
from tests.bench.variants import a_check

ENDS = {
    "works": ("ok", ""),
    "fails": ("failed", "RunError: lame on cpu"),
    "hangs": ("failed", "took longer than 2 s"),
    "dies": ("failed", "its process ended with exit code 7"),
    "skips": ("skipped", "no second leg here"),
}


def made(*hows: str) -> list[Check]:
    return [Check(how, a_check, 2 if how == "hangs" else 60, {"how": how}) for how in hows]


def test_a_check_that_fails_hangs_or_dies_stops_no_other_and_the_report_says_why(tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    outcomes = command.gpu_check(device="cpu", quick=True, out=out, minutes=5, checks=made(*ENDS, "works"))
    assert [one.name for one in outcomes] == [*ENDS, "works"]
    for one in outcomes:
        state, reason = ENDS[one.name]
        assert one.state == state and one.reason.startswith(reason)
        assert one.figures == ({} if one.name in ("hangs", "dies") else {"legs": 3.0})
    text = out.read_text()
    assert text.startswith("## stage-ray gpu-check: 2 ok, 3 failed, 1 skipped\n")
    assert (
        "\n| torch | " in text and "\n| fails | failed | " in text and "**skips** skipped: no second leg here" in text
    )


def test_when_the_time_is_over_a_check_fails_unrun(tmp_path: Path) -> None:
    (one,) = command.gpu_check(device="cpu", quick=True, out=tmp_path / "x", minutes=0.01, checks=made("works"))
    assert (one.state, one.reason) == ("failed", "not run: 0.01 minutes are over")


@pytest.mark.parametrize(("hows", "code"), [(("works", "skips"), 0), (("works", "fails"), 1)])
def test_the_exit_code_says_whether_a_check_failed(
    hows: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "checks", lambda: made(*hows))
    assert main(["gpu-check", "--device", "cpu", "--out", str(tmp_path / "report.md")]) == code
    assert capsys.readouterr().out == (tmp_path / "report.md").read_text()


def test_without_a_gpu_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu-check", "--out", str(tmp_path / "report.md")]) == 2
    assert "make install VARIANT=gpu" in capsys.readouterr().err


def test_the_large_model_has_the_published_ones_shapes() -> None:
    tokenizer = AutoProcessor.from_pretrained(resolve_path(SHIPPED)).tokenizer
    ours, published = config_sizes(build_config(JANUS_PRO_1B, tokenizer), "", ""), KNOWN["janus-pro-1b"]
    for name in ("trained", "head", "image_embedding", "vqmodel", "layers", "heads", "codes", "image_tokens"):
        assert getattr(ours, name) == getattr(published, name), name


@pytest.mark.slow
def test_every_check_passes_on_the_cpu_with_small_shapes(tmp_path: Path) -> None:
    # Their limits are a GPU's, for shapes of a real size; beside other tests on two slow cores small ones take as long.
    slow = {"limit_s": 1000.0}
    checks = [
        replace(one, **slow, options=one.options | (slow if "limit_s" in one.options else {}))
        for one in command.checks()
    ]
    outcomes = command.gpu_check(device="cpu", quick=True, out=tmp_path / "x", minutes=60, checks=checks)
    assert {one.name: one.reason for one in outcomes if one.state == "failed"} == {}
    skipped = [one.name for one in outcomes if one.state == "skipped"]
    assert skipped in (["sleep/vllm"], ["parity/vllm", "sleep/vllm"])
