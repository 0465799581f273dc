"""Emu3 end to end: trained two steps on Ray through vLLM, evaluated, drawn from, loaded again by plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Emu3ForConditionalGeneration

from stage_ray.cli import main
from stage_ray.evaluation.base import read_result
from stage_ray.train import train
from tests.chaos import audited
from tests.policies.emu3 import COLUMNS, ROWS, TEXTS, tiny_emu3
from tests.runs import lines, tiny_run

pytest.importorskip("vllm")


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_a_model_is_trained_evaluated_and_loaded_again(tmp_path: Path) -> None:
    model = tiny_emu3(tmp_path / "model")
    (tmp_path / "mine.txt").write_text("\n".join(TEXTS))
    run = tiny_run(
        tmp_path,
        model,
        steps=2,
        policy={"family": "emu3"},
        prompts={"train": str(tmp_path / "mine.txt"), "heldout": str(tmp_path / "mine.txt")},
        rollout={"engine": "vllm", "tensor_parallel": 2, "guidance_scale": 2.0, "images_per_batch": 8},
    )
    train(run)
    evaluated = [read_result(tmp_path / "run" / "evaluation" / f"{when}.json") for when in ("before", "after")]
    assert all(found is not None and len(found.images) == 2 * len(TEXTS) for found in evaluated)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["kl"] > 0
    assert max(row["mismatch/abs_logprob"] for row in rows) < 1e-4  # of the second step too: the new weights arrived
    assert audited(tmp_path / "run", ended=True).trained == 4

    final = tmp_path / "run" / "final"
    after, before = (Emu3ForConditionalGeneration.from_pretrained(path).state_dict() for path in (final, model))
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all(name.startswith("model.text_model.") for name in moved)
    prompt = ["--prompt", TEXTS[0], "--images", "2", "--engine", "torch"]
    assert main(["generate", str(final), *prompt, "--out", str(tmp_path / "pictures")]) == 0
    assert Image.open(tmp_path / "pictures" / "0000-0.png").size == (8 * COLUMNS, 8 * ROWS)
