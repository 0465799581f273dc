"""LlamaGen end to end: converted, trained two steps on Ray through vLLM, evaluated, drawn from, loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from stage_ray.cli import main
from stage_ray.policies.llamagen.model import LlamaGenModel
from stage_ray.train import train
from tests.chaos import audited
from tests.policies.deepseek import PIXELS
from tests.policies.llamagen import TEXTS, publish
from tests.runs import lines, tiny_run

pytest.importorskip("vllm")


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize(("condition", "processes"), [("class", 1), ("text", 2)])
def test_a_published_model_is_converted_trained_evaluated_and_loaded_again(
    condition: str, processes: int, tmp_path: Path
) -> None:
    publish(tmp_path / "source", condition)
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "model")]) == 0
    (tmp_path / "mine.txt").write_text("\n".join(TEXTS[condition]))
    run = tiny_run(
        tmp_path,
        tmp_path / "model",
        steps=2,
        policy={"family": "llamagen"},
        prompts={"train": str(tmp_path / "mine.txt"), "heldout": str(tmp_path / "mine.txt")},
        rollout={"engine": "vllm", "tensor_parallel": processes, "guidance_scale": 2.0, "images_per_batch": 8},
        recipe="ar_grpo",
    )
    train(run)
    evaluated = [
        json.loads((tmp_path / "run" / "evaluation" / f"{when}.json").read_text()) for when in ("before", "after")
    ]
    assert all(len(found["images"]) == 8 and found["scores"]["Brightness"] > 0 for found in evaluated)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["kl"] > 0
    assert max(row["mismatch/abs_logprob"] for row in rows) < 1e-4  # of the second step too: the new weights arrived
    assert audited(tmp_path / "run", ended=True).trained == 4

    final = tmp_path / "run" / "final"
    model, before = LlamaGenModel.from_pretrained(final), LlamaGenModel.from_pretrained(tmp_path / "model")
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])}
    assert {"gpt.head.weight", "gpt.image_embedding.weight"} < moved and all(name.startswith("gpt.") for name in moved)
    prompt = ["--prompt", TEXTS[condition][0], "--images", "2", "--engine", "torch"]
    assert main(["generate", str(final), *prompt, "--out", str(tmp_path / "pictures")]) == 0
    assert Image.open(tmp_path / "pictures" / "0000-0.png").size == (PIXELS, PIXELS)
