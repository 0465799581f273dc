"""What a learner loads and keeps, where and in which dtype, and what it anchors the policy to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from stage_ray.errors import ConfigError
from stage_ray.learner import learner as module
from stage_ray.learner.batch import LearnerError
from stage_ray.learner.learner import Learner
from stage_ray.learner.ranks import Ranks
from stage_ray.policies import load_policy
from tests.learner_case import PROMPTS, sample_groups, score, tiny_run
from tests.tiny import tiny_janus

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TRAINED, RANDOM = "model.language_model.layers.0.mlp.up_proj.weight", "model.vqmodel.quantize.embedding.weight"


@pytest.fixture
def four_ranks() -> Iterator[Ranks]:
    """The first of four ranks, the others made up: nothing that it gathers is real."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield Ranks(0, 4, init_device_mesh("cpu", (4,)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model after an update at a high learning rate."""
    learner = Learner(tiny_run(model, learner={"lr": 1e-2}))
    groups = sample_groups(learner.policy, PROMPTS, 4)
    learner.update(groups, score(groups))
    learner.export(tmp_path_factory.mktemp("trained") / "final")
    return tmp_path_factory.getbasetemp() / "trained0" / "final"


def test_a_rank_keeps_its_share_of_the_policy_before_it_loads_the_reference(model, four_ranks, monkeypatch):
    events = []
    load, shard = module.load_policy, Ranks.shard
    monkeypatch.setattr(module, "load_policy", lambda *a, **k: events.append("load") or load(*a, **k))
    monkeypatch.setattr(Ranks, "shard", lambda *a, **k: shard(*a, **k) or events.append("shard"))
    both = {"gradient_checkpointing": False}  # chosen by memory, all ranks agree, which made up ones do not
    learner = Learner(tiny_run(model, learner=both), ranks=four_ranks)
    assert events == ["load", "shard"] * 2
    for policy in (learner.policy, learner._reference):
        parameters = policy.trained_parameters().values()
        held, whole = (
            sum(map(torch.Tensor.numel, tensors)) for tensors in ([p.to_local() for p in parameters], parameters)
        )
        assert held <= whole * 0.3


def test_only_what_makes_images_is_kept_and_no_picture_is_made(model):
    learner = Learner(tiny_run(model))
    for policy in (learner.policy, learner._reference):
        parts = {name for name, _ in policy.model.named_children()} | {
            name for name, _ in policy.model.model.named_children()
        }
        assert parts == {"model", "language_model", "generation_embeddings", "generation_aligner", "generation_head"}
    with pytest.raises(RuntimeError, match="no image decoder"):
        learner.policy.codec.decode(torch.zeros(1, 16, dtype=torch.int64))


def test_a_reference_in_bfloat16_rounds_nothing_that_autocast_does_not(model):
    run = tiny_run(model, learner={"autocast": "bfloat16"})
    narrow, wide = Learner(run), Learner(run)
    wide._passes._reference_model = load_policy(run.policy, device=CPU)
    dtypes = {parameter.dtype for parameter in narrow._reference.trained_parameters().values()}
    assert dtypes == {torch.bfloat16, torch.float32}
    groups = sample_groups(Learner(tiny_run(model)).policy, PROMPTS, 4)
    one, two = narrow.update(groups, score(groups)), wide.update(groups, score(groups))
    assert {k: v for k, v in one.items() if "time/" not in k} == {k: v for k, v in two.items() if "time/" not in k}
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(narrow.weights(), wide.weights(), strict=True))


def test_a_reference_in_bfloat16_beside_a_policy_in_float32_is_off_by_rounding(model):
    learner = Learner(tiny_run(model, learner={"reference_dtype": "bfloat16"}))
    groups = sample_groups(learner.policy, PROMPTS, 4)
    metrics = learner.update(groups, score(groups))
    assert 0 < metrics["kl"] < 1e-3 and metrics["mismatch/abs_logprob"] < 1e-5


def test_an_offloaded_reference_comes_for_its_pass_and_goes(model, monkeypatch):
    learner = Learner(tiny_run(model, learner={"reference_offload": True}))
    moves = []
    run_reference = learner._passes.reference
    monkeypatch.setattr(learner._reference.model, "to", moves.append)
    monkeypatch.setattr(learner._passes, "reference", lambda *a: moves.append("runs") or run_reference(*a))
    groups = sample_groups(learner.policy, PROMPTS, 4)
    learner.update(groups, score(groups))
    assert moves == [learner._device, "runs", CPU]


def test_training_on_from_a_trained_checkpoint_keeps_the_anchor(model, trained, tmp_path):
    first, moved = Learner(tiny_run(model)), Learner(tiny_run(trained))
    on = Learner(tiny_run(trained, policy={"reference": str(model)}))
    groups = sample_groups(moved.policy, PROMPTS, 4)
    assert moved.update(groups, score(groups))["kl"] == 0
    assert on.update(groups, score(groups))["kl"] > 0.01
    on.save_state(tmp_path / "state")
    first.load_state(tmp_path / "state")  # of the same anchor
    with pytest.raises(LearnerError, match="another reference"):
        moved.load_state(tmp_path / "state")


def edited(model: Path, tmp_path: Path, name: str) -> str:
    """A copy with one tensor changed."""
    copy = tiny_janus(tmp_path / "edited")
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return str(copy)


def test_another_model_is_no_reference_and_both_are_named(model, tmp_path):
    other = edited(model, tmp_path, RANDOM)
    with pytest.raises(ConfigError) as caught:
        Learner(tiny_run(model, policy={"reference": other}))
    said = str(caught.value)
    assert f"policy.reference = {other}" in said and f"policy.path = {model}" in said and "image tokens differ" in said
    Learner(tiny_run(model, policy={"reference": edited(model, tmp_path, TRAINED)}))


def test_a_broken_reference_is_named_by_its_own_key(model, tmp_path):
    with pytest.raises(ConfigError, match=r"^policy\.reference: .*nowhere does not exist"):
        Learner(tiny_run(model, policy={"reference": "./nowhere"}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"^policy\.reference: .*'llama' model"):
        Learner(tiny_run(model, policy={"reference": str(tmp_path)}))
