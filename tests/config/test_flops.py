"""Model FLOPs: the formulas against what torch counts in a real model, and the utilisation that comes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from stage_ray.config import PolicyConfig
from stage_ray.config.flops import forward_flops, sampling_flops, training_flops
from stage_ray.config.model_sizes import KNOWN, ModelSizes
from stage_ray.engines import build_engine
from stage_ray.learner.learner import Learner
from stage_ray.policies import load_policy
from stage_ray.policies.base import Policy
from stage_ray.policies.devices import peak_flops
from stage_ray.records import Prompt, RolloutRequest
from stage_ray.workers.rollout import RolloutWorker
from tests.learner_case import PROMPTS, sample_groups, score, tiny_run

PROMPT = tuple(range(9, 20))
BIASES = 2e-3  # the formulas count the head's, which multiply nothing


@pytest.fixture(scope="module")
def policy(model) -> Policy:
    return load_policy(PolicyConfig(path=str(model)), device=torch.device("cpu"))


@pytest.fixture
def sizes(policy) -> ModelSizes:
    found = policy.codec.sizes()
    assert found is not None
    return found


def counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # its fused kernel is not counted
        work()
    return counter.get_total_flops()


def test_a_forward_and_a_training_pass_are_what_torch_counts(policy, sizes):
    tokens = torch.arange(policy.image_tokens).unsqueeze(0)
    embedding = counted(lambda: policy.embed_image_tokens(tokens[:, :-1]))  # frozen, and no part of the formula
    with torch.no_grad():
        forward = counted(lambda: policy.image_logits([PROMPT], tokens))
    both = counted(lambda: policy.image_logits([PROMPT], tokens).sum().backward())
    policy.model.zero_grad()
    assert forward_flops(sizes, len(PROMPT)) == pytest.approx(forward - embedding, rel=BIASES)
    assert training_flops(sizes, len(PROMPT)) == pytest.approx(both - embedding, rel=BIASES)


def test_beside_adapters_no_gradient_of_a_matrix_is_made(model, policy, sizes):
    tokens = torch.arange(policy.image_tokens).unsqueeze(0)

    def both(rank: int) -> int:
        config = PolicyConfig.model_validate({"path": str(model), "lora": {"rank": rank}})
        adapted = load_policy(config, device=torch.device("cpu"))
        return counted(lambda: adapted.image_logits([PROMPT], tokens).sum().backward())

    one, two = both(1), both(2)  # the adapters' own operations, which do not count, grow with the rank
    embedding = counted(lambda: policy.embed_image_tokens(tokens[:, :-1]))
    assert training_flops(sizes, len(PROMPT), adapters=True) == pytest.approx(2 * one - two - embedding, rel=BIASES)


@torch.no_grad()
def test_a_sequence_that_is_drawn_with_a_cache_is_what_torch_counts(policy, sizes):
    llama, cache = policy.model.model.language_model, DynamicCache()

    def draw() -> None:
        embeds = llama.embed_tokens(torch.tensor([PROMPT]))
        for _ in range(policy.image_tokens):
            state = llama(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            policy.head(state)
            embeds = state[:, None]  # stands for the next token's

    assert sampling_flops(sizes, len(PROMPT)) == pytest.approx(counted(draw), rel=BIASES)


def test_of_a_large_model_the_parameters_that_multiply_tokens_are_most_of_it():
    model = KNOWN["janus-pro-7b"]
    tokens, used = 64 + model.image_tokens - 1, model.layers * model.layer + model.head
    assert training_flops(model, 64) == pytest.approx(6 * used * tokens, rel=0.05)
    assert sampling_flops(model, 64) == pytest.approx(2 * used * tokens, rel=0.05)


PEAK = 1e9


@pytest.mark.parametrize(("learner", "forwards", "trained"), [({}, 1, 1), ({"updates_per_batch": 2}, 2, 2)])
def test_a_learner_says_what_of_its_device_the_update_used(model, sizes, monkeypatch, learner, forwards, trained):
    monkeypatch.setattr("stage_ray.learner.learner.peak_flops", lambda device, dtype: PEAK)
    made = Learner(tiny_run(model, learner=learner, algorithm={"clip": 0.2}), threads=1)
    groups = sample_groups(made.policy, PROMPTS, 4)
    metrics = made.update(groups, score(groups))
    lengths = [len(made.policy.codec.encode_prompt(text).conditional) for text in PROMPTS]
    flops = 4 * sum(forwards * forward_flops(sizes, n) + trained * training_flops(sizes, n) for n in lengths)
    seconds = metrics["time/reference_s"] + metrics["time/policy_s"]
    assert metrics["mfu/learner"] == pytest.approx(flops / seconds / PEAK)


def test_a_rollout_worker_says_what_of_its_device_a_batch_used(model, sizes, monkeypatch):
    monkeypatch.setattr("stage_ray.workers.rollout.redirect_output", lambda log, role, worker: None)
    monkeypatch.setattr("stage_ray.workers.rollout.device_for", lambda gpus, key: torch.device("cpu"))
    run = tiny_run(model, rollout={"gpus": 1.0, "engine": "torch", "guidance_scale": 3.0})
    worker = RolloutWorker("rollout-0", run, None)
    worker._engine = build_engine(run.policy, run.rollout.model_copy(update={"gpus": 0.0}), worker="rollout-0")
    request = RolloutRequest(7, Prompt(0, PROMPTS[0]), (1, 2, 3))
    (_, _, unknown, *_), _ = worker.generate(request)
    assert unknown is None
    monkeypatch.setattr("stage_ray.workers.rollout.peak_flops", lambda device, dtype: PEAK)
    (_, seconds, mfu, *_), _ = worker.generate(request)
    length = len(worker._engine.encode_prompt(PROMPTS[0]).conditional)
    assert mfu == pytest.approx(2 * 3 * sampling_flops(sizes, length) / seconds / PEAK)


def test_a_peak_is_known_of_whole_gpus_by_their_names_and_in_bfloat16(monkeypatch):
    gpu = torch.device("cuda")
    for name, peak in {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None}.items():
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu, torch.bfloat16) == peak and peak_flops(gpu, torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
