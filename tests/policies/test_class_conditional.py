"""A family that the package does not know, by its dotted path: classes for prompts, two-dimensional positions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as processes
import yaml
from safetensors.torch import load_file, save_file

from stage_ray.cli import main
from stage_ray.commands.train import replay_run
from stage_ray.config import PolicyConfig
from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageEngine
from stage_ray.engines.sampling import SamplingParams
from stage_ray.errors import ConfigError
from stage_ray.learner.learner import Learner
from stage_ray.learner.ranks import Ranks
from stage_ray.observability.progress import Progress
from stage_ray.policies import load_policy
from stage_ray.policies.reference import check_reference
from stage_ray.train import train
from tests import learner_case
from tests.class_conditional import FAMILY, ClassModel, ClassPolicy, Sizes, class_checkpoint, rotary_2d, rotate
from tests.engines.test_engines import assert_statistics_match, request, rollout, weights_of
from tests.ray_head import free_port
from tests.runs import StopsAfter, lines, tiny_run

CPU = torch.device("cpu")
CLASSES = ["ostrich", "2", "goldfish", "great white shark"]  # one by its number


def config(path: Path, **changes: str) -> PolicyConfig:
    return PolicyConfig.model_validate({"path": str(path), "family": FAMILY, **changes})


def policy_at(path: Path) -> ClassPolicy:
    policy = load_policy(config(path), device=CPU)
    assert isinstance(policy, ClassPolicy)
    return policy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_checkpoint(tmp_path_factory.mktemp("model") / "classes")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The same model at other trained weights."""
    directory = class_checkpoint(tmp_path_factory.mktemp("other") / "classes", seed=1)
    tokenizer = {name: tensor for name, tensor in load_file(checkpoint / "model.safetensors").items() if "vq." in name}
    save_file(load_file(directory / "model.safetensors") | tokenizer, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module", params=["torch", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ImageEngine]:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    engine = build_engine(config(checkpoint), rollout(request.param), worker=f"test-{request.param}")
    assert isinstance(engine, ImageEngine)
    yield engine
    engine.close()


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


def test_what_is_recorded_is_what_a_full_forward_says_guided_or_not_at_every_version(
    engine: ImageEngine, checkpoint: Path, other: Path
) -> None:
    requests = [request(name, (3, 50 + index), index) for index, name in enumerate(CLASSES)]
    for version, path in enumerate([checkpoint, other]):
        policy = policy_at(path)
        if version:
            engine.load_weights(version, weights_of(policy))
        for params in (engine.params, SamplingParams(), SamplingParams(guidance_scale=3.0, temperature=0.8, top_k=20)):
            for group in engine.generate(requests, params):
                assert group.policy_version == version and group.images.shape == (2, 12, 20, 3)
                assert_statistics_match(group, policy, params)
    with pytest.raises(ValueError, match="'ostrik' is no class"):
        engine.generate([request("ostrik", (1,))])


def learner_at(path: Path, ranks: Ranks | None = None, **sections: Any) -> Learner:
    run = learner_case.tiny_run(path, policy={"path": str(path), "family": FAMILY}, **sections)
    return Learner(run, threads=1, ranks=ranks or Ranks())


def updates(learner: Learner, count: int) -> list[dict[str, float]]:
    """On groups that the checkpoint drew, so that every rank has the same."""
    groups = learner_case.sample_groups(policy_at(Path(learner._run.policy.path)), CLASSES, 4)
    return [learner.update(groups, learner_case.score(groups)) for _ in range(count)]


SEVERAL = {"pipeline": {"max_staleness": 5}, "learner": {"lr": 1e-3, "autocast": "off", "micro_batch_images": 4}}


def test_a_learner_trains_embeddings_and_head_too_and_what_it_saves_and_exports_loads(
    checkpoint: Path, tmp_path: Path
) -> None:
    learner = learner_at(checkpoint, **SEVERAL)
    first = updates(learner, 1)[0]
    assert first["kl"] == 0 and first["mismatch/abs_logprob"] < 1e-5
    learner.save_state(tmp_path / "state")
    learner.export(tmp_path / "export")
    exported, before = (ClassModel.from_pretrained(path).state_dict() for path in (tmp_path / "export", checkpoint))
    trained = dict(learner.weights())
    for name, tensor in exported.items():
        assert torch.equal(tensor, trained.get(name, before[name]))
        assert torch.equal(tensor, before[name]) == name.startswith("vq."), name
    again = learner_at(checkpoint, **SEVERAL)
    again.load_state(tmp_path / "state")
    assert again.version == 1 and updates(again, 1)[0]["loss"] == updates(learner, 1)[0]["loss"]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(again.weights(), learner.weights(), strict=True))


def _rank(number: int, address: str, path: Path, out: Path) -> None:
    torch.set_num_threads(1)
    learner = learner_at(path, Ranks.init_process_group(number, 2, address, CPU, timeout_s=120), **SEVERAL)
    assert {type(parameter).__name__ for parameter in learner.policy.trained_parameters().values()} == {"DTensor"}
    updates(learner, 2)
    found = {name: tensor.clone() for name, tensor in learner.weights()}
    if number == 0:
        save_file(found, out / "two.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_what_is_trained_outside_of_the_backbone_too(checkpoint: Path, tmp_path: Path) -> None:
    processes.spawn(_rank, (f"127.0.0.1:{free_port()}", checkpoint, tmp_path), nprocs=2)
    alone = learner_at(checkpoint, **SEVERAL)
    updates(alone, 2)
    two = load_file(tmp_path / "two.safetensors")
    for name, tensor in alone.weights():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=2e-5)


def test_a_reference_is_the_model_at_other_weights_and_with_the_same_classes(
    checkpoint: Path, other: Path, tmp_path: Path
) -> None:
    check_reference(config(checkpoint, reference=str(other)))
    assert updates(learner_at(checkpoint, **SEVERAL | {"algorithm": {"beta": 0.1}}), 1)[0]["kl"] == 0
    renamed = class_checkpoint(tmp_path / "renamed", sizes=Sizes(classes=tuple("abcdef")))
    with pytest.raises(ConfigError, match="prompt tokens differ"):
        check_reference(config(checkpoint, reference=str(renamed)))


def run_of(directory: Path, model: Path, classes: list[str] | None = None, **changes: Any):
    directory.mkdir(exist_ok=True)
    (directory / "classes.txt").write_text("\n".join(classes or CLASSES))
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
