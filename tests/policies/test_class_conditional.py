"""A family that the package does not know, by its dotted path: classes for prompts, two-dimensional positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stage_ray.cli import main
from stage_ray.commands.train import replay_run
from stage_ray.engines import build_engine
from stage_ray.errors import ConfigError
from stage_ray.learner.learner import Learner
from stage_ray.observability.progress import Progress
from stage_ray.policies.reference import check_reference
from stage_ray.train import train
from tests import learner_case
from tests.class_conditional import FAMILY, Sizes, class_checkpoint, rotary_2d, rotate
from tests.engines.test_engines import request, rollout
from tests.policies.families import FAMILIES, drawn, moved
from tests.runs import StopsAfter, lines, tiny_run

CLASSES = FAMILIES["dotted path"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_checkpoint(tmp_path_factory.mktemp("model") / "classes")


def test_attention_depends_on_rows_and_columns_between_two_tokens_alone() -> None:
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij")
    turned = [rotate(vector, rotary_2d(1 + torch.arange(15), 5, 16)) for vector in (query, key)]
    scores = turned[0] @ turned[1].T  # of every token to every token
    apart = {}
    for one in range(15):
        for two in range(15):
            step = (
                int(rows.flatten()[one] - rows.flatten()[two]),
                int(columns.flatten()[one] - columns.flatten()[two]),
            )
            torch.testing.assert_close(scores[one, two], apart.setdefault(step, scores[one, two]), atol=1e-4, rtol=0)
    assert len({round(float(score), 4) for score in apart.values()}) == len(apart) == 5 * 9


def test_a_reference_is_the_model_at_other_weights_and_with_the_same_classes(checkpoint: Path, tmp_path: Path) -> None:
    other = moved(checkpoint, tmp_path / "other", CLASSES)
    check_reference(CLASSES.config(checkpoint, reference=str(other)))
    policy = {"path": str(checkpoint), "family": FAMILY, "reference": str(other)}
    learner = Learner(learner_case.tiny_run(checkpoint, policy=policy, algorithm={"beta": 0.1}), threads=1)
    assert learner.update(*drawn(CLASSES, checkpoint))["kl"] > 0
    renamed = class_checkpoint(tmp_path / "renamed", sizes=Sizes(classes=tuple("abcdef")))
    with pytest.raises(ConfigError, match="prompt tokens differ"):
        check_reference(CLASSES.config(checkpoint, reference=str(renamed)))


def test_a_prompt_that_is_no_class_is_refused(checkpoint: Path) -> None:
    engine = build_engine(CLASSES.config(checkpoint), rollout("torch"), worker="test")
    with pytest.raises(ValueError, match="'ostrik' is no class"):
        engine.generate([request("ostrik", (1,))])
    engine.close()


def run_of(directory: Path, model: Path, classes: list[str] | None = None, **changes: Any):
    directory.mkdir(exist_ok=True)
    (directory / "classes.txt").write_text("\n".join(classes or CLASSES.texts))
    return tiny_run(
        directory,
        model,
        policy={"family": FAMILY},
        prompts={"train": str(directory / "classes.txt"), "heldout": str(directory / "classes.txt")},
        rollout={"guidance_scale": 2.0},
        **changes,
    )


def test_an_unknown_class_is_refused_by_its_name_and_line_before_anything_starts(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, checkpoint, ["ostrich", "golfish", "17"])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err
    assert "2 of 3 prompts cannot be drawn" in said and "classes.txt, line 2" in said
    assert "'golfish' is no class of classes; did you mean 'goldfish'?" in said and "'17' is no class" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_a_run_through_the_command_line_is_recorded_resumed_and_replayed(checkpoint: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, checkpoint, pipeline={"record": True}, checkpoint={"every": 1})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    with pytest.raises(KeyboardInterrupt):
        train(run.model_copy(update={"steps": 2}), progress=StopsAfter(2))  # before its checkpoint
    assert main(["train", str(tmp_path / "run.yaml"), "--set", "steps=2", "--resume"]) == 0
    whole = tmp_path / "run"
    rows = lines(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["kl"] > 0
    assert max(row["mismatch/abs_logprob"] for row in rows) < 1e-4
    final = load_file(whole / "final" / "model.safetensors")
    assert json.loads((whole / "final" / "config.json").read_text())["classes"] == list(Sizes().classes)

    # The replay is one learner from its first step to its last: what it ends with is what the resumed run should have.
    replayed = replay_run(run.model_copy(update={"steps": 2, "run_dir": str(tmp_path / "replayed")}), whole, Progress())
    assert [row["loss"] for row in lines(replayed / "metrics.jsonl")] == [row["loss"] for row in rows]
    straight = load_file(replayed / "final" / "model.safetensors")
    assert all(torch.equal(straight[name], tensor) for name, tensor in final.items())
