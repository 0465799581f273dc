"""Families end to end: trained two steps on Ray through vLLM, evaluated, drawn from, loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from stage_ray.cli import main
from stage_ray.evaluation.base import read_result
from stage_ray.pretrained import read_tensors
from stage_ray.train import train
from tests.chaos import audited
from tests.policies.families import FAMILIES
from tests.runs import lines, tiny_run

pytest.importorskip("vllm")


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize("name", ["dotted path", "llamagen, captions", "emu3"])
def test_a_model_is_trained_evaluated_and_loaded_again(name: str, tmp_path: Path) -> None:
    family, model, prompts = FAMILIES[name], tmp_path / "model", tmp_path / "mine.txt"
    family.write(model)
    prompts.write_text("\n".join(family.texts))
    run = tiny_run(
        tmp_path,
        model,
        steps=2,
        policy={"family": family.name},
        prompts={"train": str(prompts), "heldout": str(prompts)},
        rollout={
            "engine": "vllm",
            "tensor_parallel": family.processes,
            "guidance_scale": 2.0,
            "images_per_batch": 8,
        },
        recipe="ar_grpo",
    )
    train(run)
    for when in ("before", "after"):
        found = read_result(tmp_path / "run" / "evaluation" / f"{when}.json")
        assert found is not None and len(found.images) == 2 * len(family.texts)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["kl"] > 0
    assert max(row["mismatch/abs_logprob"] for row in rows) < 1e-4  # of the second step too: the new weights arrived
    assert audited(tmp_path / "run", ended=True).trained == 4

    final = tmp_path / "run" / "final"
    after, before = (read_tensors(path, ("",)) for path in (final, model))
    assert {name for name in after if not torch.equal(after[name], before[name])} == {*filter(family.is_trained, after)}
    prompt = ["--prompt", family.texts[0], "--images", "2", "--engine", "torch"]
    prompt += ["--set", f"policy.family={family.name}"] if "." in family.name else []  # others are known by their files
    assert main(["generate", str(final), *prompt, "--out", str(tmp_path / "pictures")]) == 0
    policy = family.policy(final)
    height, width = policy.codec.decode(torch.zeros(1, policy.image_tokens, dtype=torch.int64)).shape[1:3]
    assert Image.open(tmp_path / "pictures" / "0000-0.png").size == (width, height)
