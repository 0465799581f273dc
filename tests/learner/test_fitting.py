"""An update is cut to fit memory before the first, or refused with the keys to change."""

from __future__ import annotations

import pytest
import torch

from stage_ray.config import hardware
from stage_ray.errors import ConfigError
from stage_ray.learner import fitting
from stage_ray.learner.batch import LearnerError
from stage_ray.learner.fitting import choose_cut
from stage_ray.learner.learner import Learner
from stage_ray.learner.memory import learner_memory
from stage_ray.learner.ranks import Ranks
from stage_ray.policies import policy_class
from tests.learner_case import PROMPTS, sample_groups, score, tiny_run
from tests.plain import FAMILY

CPU = torch.device("cpu")
AUTO = {"micro_batch_images": None, "gradient_checkpointing": None}


def chosen(model, free, monkeypatch, family="janus", **learner):
    """The cut for a machine where ``free`` bytes may be filled, or as many as micro-batches of such a cut need."""
    run = tiny_run(model, policy={"family": family}, learner={**AUTO, **learner})
    codec = policy_class(run.policy).load_codec(run.policy, device=None)
    if isinstance(free, tuple):
        images, checkpointing = free
        cut = {"images": images, "checkpointing": checkpointing}
        prompt = codec.positions - codec.image_tokens
        free = sum(learner_memory(codec.sizes(), ranks=1, prompt=prompt, dtype="float32", **cut).values())
    monkeypatch.setattr(fitting, "free_memory", lambda run, device: free)
    return choose_cut(run, codec, Ranks(), CPU, bfloat16=False, reference_bfloat16=False)


def test_the_largest_micro_batch_that_fits_is_chosen_and_recomputing_where_none_does(model, monkeypatch):
    assert chosen(model, 2**40, monkeypatch) == (32, False)
    assert chosen(model, (16, False), monkeypatch) == (16, False)
    assert chosen(model, (32, True), monkeypatch, micro_batch_images=32) == (32, True)
    assert chosen(model, (1, False), monkeypatch, gradient_checkpointing=False) == (1, False)


def test_what_the_config_says_is_taken_and_a_family_without_sizes_reckons_nothing(model, plain, monkeypatch):
    assert chosen(model, 0, monkeypatch, micro_batch_images=64, gradient_checkpointing=False) == (64, False)
    assert chosen(plain, 0, monkeypatch, FAMILY) == (32, False)


def test_what_cannot_fit_is_refused_before_the_first_update(model, monkeypatch):
    monkeypatch.setattr(fitting, "free_memory", lambda run, device: 2**20)
    with pytest.raises(ConfigError) as caught:
        Learner(tiny_run(model, learner=AUTO))
    said = str(caught.value)
    assert said.startswith("learner does not fit: micro-batches of 1 image(s) need 0.1 GiB, most of it")
    fix = "set learner.autocast=bfloat16 or learner.ranks above 1"
    assert said.endswith(f"{fix}, or train adapters with policy.lora.rank=32")


def test_memory_that_runs_out_in_an_update_names_the_keys_and_changes_no_weight(model, monkeypatch):
    learner = Learner(tiny_run(model))
    groups = sample_groups(learner.policy, PROMPTS, 4)
    before = [tensor.clone() for _, tensor in learner.weights()]

    def run_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(learner._passes, "policy", run_out)
    with pytest.raises(LearnerError) as caught:
        learner.update(groups, score(groups))
    said = str(caught.value)
    assert said.startswith("update 0: micro-batches of 8 image(s) do not fit memory (CUDA out of memory. Tried")
    assert "set learner.micro_batch_images below 8, learner.gradient_checkpointing=true, " in said and "\n" not in said
    assert all(torch.equal(old, new) for old, (_, new) in zip(before, learner.weights(), strict=True))


def test_a_container_has_the_memory_that_it_is_given(tmp_path, monkeypatch):
    whole = hardware.usable_memory()
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.usable_memory() >= whole
    (tmp_path / "memory.max").write_text("1048576\n")
    assert hardware.usable_memory() == 2**20
