"""Pretraining: every stage runs, what it writes loads, and a run that was cut off goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPModel, ConvNextV2Model, JanusForConditionalGeneration, JanusProcessor

from stage_ray.cli import main
from stage_ray.shapeworld.detector import ShapeDetector
from stage_ray.shapeworld.pretrain import pretrain
from stage_ray.shapeworld.pretrain.loop import Budget, TrainingRun


def train(path: Path, steps: int, stop_after: int | None = None) -> nn.Linear:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    run = TrainingRun(path, module, peak_lr=0.1, budget=Budget(steps))
    for step, _ in run:
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        run.descend((module(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean())
        if step + 1 == stop_after:
            run.step += 1
            run.save()
            break
    return module


def test_a_training_that_was_cut_off_ends_with_the_same_weights(tmp_path: Path):
    straight = train(tmp_path / "straight.safetensors", steps=20)
    train(tmp_path / "cut.safetensors", steps=20, stop_after=7)
    resumed = train(tmp_path / "cut.safetensors", steps=20)
    assert torch.equal(straight.weight, resumed.weight) and torch.equal(straight.bias, resumed.bias)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path):
    module = nn.Linear(1, 1)
    run = TrainingRun(tmp_path / "run.safetensors", module, peak_lr=0.1, budget=Budget(2))
    with pytest.raises(FloatingPointError, match="step 0"):
        for _ in run:
            run.descend(module(torch.full((1, 1), float("nan"))).sum())


def test_the_learning_rate_follows_whichever_of_steps_and_seconds_is_further_along():
    budget = Budget(steps=100, seconds=10)
    assert budget.progress(step=50, elapsed_s=1) == 0.5
    assert budget.progress(step=10, elapsed_s=9) == 0.9
    assert budget.progress(step=10, elapsed_s=99) == 1.0


def test_an_unknown_stage_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no stage is called tokeniser"):
        pretrain(tmp_path, stages=["tokeniser"])


def other_things(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").touch()


def damaged(out: Path) -> None:
    (out / "work" / "training").mkdir(parents=True)
    (out / "work" / "training" / "tokenizer.safetensors").write_bytes(b"cut")


@pytest.mark.parametrize(
    ("before", "options", "sentence"),
    [
        (Path.touch, [], "is a file; name a directory"),
        (other_things, [], "is not empty and holds nothing of a pretraining"),
        (lambda out: out.symlink_to("/proc/nowhere"), [], "cannot be written: "),
        (lambda out: (out.mkdir(), (out / "janus").touch()), [], "cannot be written: Not a directory"),
        (Path.mkdir, ["--stage", "language-model"], "add --stage tokenizer, which makes it"),
        (Path.mkdir, ["--stage", "detector", "--stage", "clip"], "--stage detector needs "),
        (damaged, [], "tokenizer.safetensors is damaged; remove it"),
        (Path.mkdir, ["--seed", "-1"], "--seed"),
    ],
)
def test_what_a_pretraining_would_fail_on_is_one_sentence_and_nothing_is_begun(
    tmp_path, before, options, sentence, capsys
):
    out = tmp_path / "world"
    before(out)
    there = sorted(tmp_path.rglob("*"))
    assert main(["pretrain", "--out", str(out), "--smoke", *options]) == 2
    assert sentence in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == there


@pytest.mark.slow
def test_a_smoke_run_builds_every_model_in_a_form_that_transformers_loads(tmp_path: Path):
    pretrain(tmp_path, smoke=True)
    janus = JanusForConditionalGeneration.from_pretrained(tmp_path / "janus")
    assert janus.dtype == torch.bfloat16
    adding = [[bool(block.conv2.weight.any()) for block in level.block] for level in janus.model.vqmodel.decoder.up]
    assert adding == [[True, False]] * 3 + [[False, False]]
    assert JanusProcessor.from_pretrained(tmp_path / "janus").num_image_tokens == 64
    assert CLIPModel.from_pretrained(tmp_path / "clip").config.projection_dim == 128
    assert ConvNextV2Model.from_pretrained(tmp_path / "features").config.hidden_sizes[-1] == 64
    assert "2 steps" in (tmp_path / "features" / "README.md").read_text()
    assert len(ShapeDetector(tmp_path / "detector").detect(np.zeros((2, 64, 64, 3), np.uint8))) == 2
    assert "| rendered |" in (tmp_path / "detector" / "README.md").read_text()
    assert "2 steps in" in (tmp_path / "janus" / "README.md").read_text()
    assert "2 steps in" in (tmp_path / "clip" / "README.md").read_text()
    for name, count in (("heldout", 100), ("binding", 96)):
        assert len((tmp_path / "prompts" / f"{name}.jsonl").read_text().splitlines()) == count
