"""Both engines against a teacher-forced transformers forward, against each other, and through weight updates.

In float32 the engines' logits differ by rounding only: kernels add in another order. A token differs where rounding
tips a draw between two nearly equal candidates, and everything after it in that image then differs too; images here
are short enough that it is rare. `test_engines_draw_the_same_images` counts it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, JanusForConditionalGeneration

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageEngine
from stage_ray.errors import ConfigError
from stage_ray.policies import load_policy
from stage_ray.policies.janus import JanusPolicy
from stage_ray.records import RECORDED, Prompt, RolloutGroup, RolloutRequest
from stage_ray.samplers import Context, SamplingParams, process_logits
from stage_ray.samplers.guided import GuidedRule
from tests.learner_case import move_weights
from tests.tiny import CODES, IMAGE_SIZE, IMAGE_TOKENS, tiny_janus

BATCH, GUIDANCE = 6, 2.0
TEXTS = ("a photo of a red circle", "a photo of a square left of a triangle", "circle")
TOLERANCE = {"atol": 2e-3, "rtol": 2e-3}


def rollout(engine: str, **settings: float | str) -> RolloutConfig:
    chosen = {"engine": engine, "dtype": "float32", "images_per_batch": BATCH, "guidance_scale": GUIDANCE}
    return RolloutConfig.model_validate({**chosen, "kv_cache_gib": 0.25, **settings})


def request(text: str, seeds: tuple[int, ...], group_id: int = 0) -> RolloutRequest:
    return RolloutRequest(group_id, Prompt(group_id, text), seeds)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_janus(tmp_path_factory.mktemp("tiny") / "janus")


def policy_at(path: Path) -> JanusPolicy:
    policy = load_policy(PolicyConfig.model_validate({"path": str(path)}), device=torch.device("cpu"))
    assert isinstance(policy, JanusPolicy)
    return policy


@pytest.fixture(scope="module")
def policy(directory: Path) -> JanusPolicy:
    return policy_at(directory)


@pytest.fixture(scope="module")
def updated(directory: Path) -> JanusPolicy:
    """The same model with other values in its trained tensors: what the engines are updated to."""
    policy = policy_at(directory)
    move_weights(policy)
    return policy


@pytest.fixture(scope="module", params=["torch", "vllm"])
def engine(request: pytest.FixtureRequest, directory: Path) -> Iterator[ImageEngine]:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    engine = build_engine(
        PolicyConfig.model_validate({"path": str(directory)}), rollout(request.param), worker=f"test-{request.param}"
    )
    assert isinstance(engine, ImageEngine)
    yield engine
    engine.close()


@pytest.fixture
def at_version_0(engine: ImageEngine, policy: JanusPolicy) -> ImageEngine:
    if engine.policy_version != 0:
        engine.load_weights(0, weights_of(policy))
    return engine


def weights_of(policy: JanusPolicy) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach().clone()) for name, parameter in policy.trained_parameters().items()]


def assert_statistics_match(group: RolloutGroup, policy: JanusPolicy, params: SamplingParams) -> None:
    """What an engine recorded is what a teacher-forced forward of transformers says of the same tokens."""
    ids = policy.codec.encode_prompt(group.prompt.text)
    tokens = torch.from_numpy(group.tokens).long()
    with torch.no_grad():
        conditional = policy.image_logits([ids.conditional] * len(tokens), tokens)
        unconditional = policy.image_logits([ids.unconditional] * len(tokens), tokens)
    chosen = tokens.unsqueeze(-1)
    logprobs = conditional.log_softmax(-1).gather(-1, chosen).squeeze(-1)
    count, steps = tokens.shape
    guided = torch.full((count * steps,), group.guided)
    context = Context(torch.arange(steps).repeat(count), tokens.repeat_interleave(steps, dim=0), guided)
    processed = process_logits(conditional.flatten(0, 1), unconditional.flatten(0, 1), params, context)
    processed = processed.view_as(conditional)
    expected = {
        "logprobs": logprobs,
        "guided_logprobs": processed.log_softmax(-1).gather(-1, chosen).squeeze(-1),
        "entropy": torch.distributions.Categorical(logits=conditional).entropy(),
        "guided_entropy": torch.special.entr(processed.softmax(-1)).sum(-1),
    }
    assert tuple(expected) == RECORDED
    for name, values in expected.items():
        found = getattr(group, name)
        assert found.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(found), values, **TOLERANCE)


def test_a_version_rounded_by_the_learner_leaves_an_engine_with_the_bits_of_its_own_rounding(
    directory: Path, updated: JanusPolicy
) -> None:
    where = PolicyConfig.model_validate({"path": str(directory)})
    engine = build_engine(where, rollout("torch", dtype="bfloat16"), worker="test-bfloat16")

    def drawn(dtype: torch.dtype) -> RolloutGroup:
        tensors = updated.trained_parameters().items()
        engine.load_weights(1, ((name, parameter.detach().to(dtype)) for name, parameter in tensors))
        return engine.generate([request(TEXTS[0], (1, 2))])[0]

    whole, rounded = drawn(torch.float32), drawn(engine.dtype)
    assert engine.dtype == torch.bfloat16
    for name in ("tokens", "logprobs", "guided_logprobs", "entropy", "images"):
        assert np.array_equal(getattr(whole, name), getattr(rounded, name)), name
    engine.close()


def test_records_match_a_teacher_forced_forward_of_transformers(at_version_0: ImageEngine, policy: JanusPolicy) -> None:
    groups = at_version_0.generate([request(text, (index, 50 + index)) for index, text in enumerate(TEXTS)])
    for group in groups:
        assert group.policy_version == 0
        assert_statistics_match(group, policy, at_version_0.params)


def test_records_match_with_temperature_top_k_and_top_p(at_version_0: ImageEngine, policy: JanusPolicy) -> None:
    params = SamplingParams(guidance_scale=3.0, temperature=0.8, top_k=20, top_p=0.95)
    assert_statistics_match(at_version_0.generate([request(TEXTS[0], (1, 2, 3))], params)[0], policy, params)


@pytest.mark.parametrize("sampler", ["entropy_informed", "tests.rules.NoRepeats"])
def test_records_match_with_another_token_rule_and_a_seed_still_gives_one_image_in_any_company(
    at_version_0: ImageEngine, policy: JanusPolicy, sampler: str
) -> None:
    params = SamplingParams.of(rollout("torch", sampler=sampler, temperature=0.9, top_k=30))
    mixed = at_version_0.generate([request(TEXTS[2], (9, 8)), request(TEXTS[0], (7, 42, 1), group_id=1)], params)
    for group in mixed:
        assert_statistics_match(group, policy, params)
    alone = at_version_0.generate([request(TEXTS[0], (42,))], params)[0]
    assert alone.tokens[0].tolist() == mixed[1].tokens[1].tolist()
    usual = at_version_0.generate([request(TEXTS[0], (42,))], dataclasses.replace(params, rule=GuidedRule()))[0]
    assert not np.array_equal(alone.guided_logprobs, usual.guided_logprobs)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_records_match_with_a_guidance_schedule_and_groups_without_guidance_in_one_batch(
    at_version_0: ImageEngine, policy: JanusPolicy, kind: str
) -> None:
    schedule = {"guidance_schedule": kind, "guidance_end": 1.0 if kind == "constant" else 4.0}
    settings = rollout("torch", sampler="entropy_informed", temperature=0.9, **schedule)
    params = SamplingParams.of(settings.model_copy(update={"guidance_interval": (0.2, 0.9)}))
    first, second = request(TEXTS[2], (9, 8)), request(TEXTS[0], (7, 42), group_id=1)
    mixed = at_version_0.generate([first, dataclasses.replace(second, guided=False)], params)
    assert [group.guided for group in mixed] == [True, False]
    for group in mixed:
        assert_statistics_match(group, policy, params)
    alone = at_version_0.generate([dataclasses.replace(second, seeds=(42,), guided=False)], params)[0]
    assert alone.tokens[0].tolist() == mixed[1].tokens[1].tolist()
    without = dataclasses.replace(params, guidance_scale=1.0, schedule=SamplingParams().schedule)
    np.testing.assert_array_equal(at_version_0.generate([second], without)[0].tokens, mixed[1].tokens)
    assert not np.array_equal(at_version_0.generate([second], params)[0].guided_logprobs, mixed[1].guided_logprobs)


def test_after_a_weight_update_records_match_the_new_model_and_carry_its_version(
    at_version_0: ImageEngine, updated: JanusPolicy
) -> None:
    before = at_version_0.generate([request(TEXTS[1], (1, 2))])[0]
    at_version_0.load_weights(7, weights_of(updated))
    after = at_version_0.generate([request(TEXTS[1], (1, 2))])[0]
    assert (before.policy_version, after.policy_version) == (0, 7)
    assert not np.array_equal(before.tokens, after.tokens)
    assert_statistics_match(after, updated, at_version_0.params)


def test_without_guidance_images_come_from_the_conditional_branch(
    at_version_0: ImageEngine, policy: JanusPolicy
) -> None:
    group = at_version_0.generate([request(TEXTS[0], (3, 4))], SamplingParams())[0]
    np.testing.assert_array_equal(group.guided_logprobs, group.logprobs)
    assert_statistics_match(group, policy, SamplingParams())


def test_greedy_images_are_those_of_transformers_generate(at_version_0: ImageEngine, directory: Path) -> None:
    model = JanusForConditionalGeneration.from_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory)
    messages = [{"role": "user", "content": [{"type": "text", "text": TEXTS[1]}]}]
    chat = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[chat], generation_mode="image", return_tensors="pt")
    expected = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=GUIDANCE)
    found = at_version_0.generate([request(TEXTS[1], (0,))], SamplingParams(guidance_scale=GUIDANCE, top_k=1))[0]
    assert found.tokens.tolist() == expected.tolist()


def test_a_seed_gives_the_same_image_alone_in_a_full_batch_and_in_other_company(at_version_0: ImageEngine) -> None:
    alone = at_version_0.generate([request(TEXTS[0], (42,))])[0].tokens[0]
    full = at_version_0.generate([request(TEXTS[0], (1, 42, 2, 3, 4, 5))])[0].tokens[1]
    mixed = at_version_0.generate([request(TEXTS[2], (9, 8, 42)), request(TEXTS[0], (7, 42), group_id=1)])[1].tokens[1]
    assert alone.tolist() == full.tolist() == mixed.tolist()


def test_more_images_than_a_batch_holds_are_cut_and_groups_keep_their_order(at_version_0: ImageEngine) -> None:
    requests = [request(TEXTS[i % 3], tuple(range(10 * i, 10 * i + 5)), group_id=30 - i) for i in range(3)]
    groups = at_version_0.generate(requests)
    assert [group.group_id for group in groups] == [30, 29, 28]
    for asked, group in zip(requests, groups, strict=True):
        assert group.seeds == asked.seeds and group.prompt is asked.prompt and group.generate_s > 0
        assert group.tokens.shape == (5, IMAGE_TOKENS) and group.tokens.dtype == np.int32
        assert group.tokens.min() >= 0 and group.tokens.max() < CODES
    once_more = at_version_0.generate([requests[2]])[0]
    np.testing.assert_array_equal(once_more.tokens, groups[2].tokens)
    assert at_version_0.generate([]) == []


def test_pictures_are_the_policys_decoding_of_the_tokens(at_version_0: ImageEngine, policy: JanusPolicy) -> None:
    group = at_version_0.generate([request(TEXTS[0], (1, 2))])[0]
    assert group.images.shape == (2, IMAGE_SIZE, IMAGE_SIZE, 3) and group.images.dtype == np.uint8
    expected = policy.codec.decode(torch.from_numpy(group.tokens).long()).numpy()
    assert np.abs(group.images.astype(int) - expected.astype(int)).max() <= 1


def test_a_bad_weight_update_is_refused_and_the_old_version_stays(
    at_version_0: ImageEngine, updated: JanusPolicy
) -> None:
    good = weights_of(updated)
    name, tensor = good[0]
    bad = {
        "not a trained tensor": [*good, ("model.vqmodel.quantize.embedding.weight", tensor)],
        "1 tensors are missing": good[1:],
        "comes twice": [*good, good[0]],
        "this model has": [(name, tensor[:-1]), *good[1:]],
        "not finite": [(name, torch.full_like(tensor, torch.nan)), *good[1:]],
    }
    asked = [request(TEXTS[0], (1, 2))]
    before = at_version_0.generate(asked)[0]
    for message, tensors in bad.items():
        with pytest.raises(ValueError, match=message):
            at_version_0.load_weights(1, tensors)
    after = at_version_0.generate(asked)[0]
    assert after.policy_version == 0
    np.testing.assert_array_equal(before.tokens, after.tokens)


def test_an_update_that_breaks_half_way_stops_generation_until_one_succeeds(
    at_version_0: ImageEngine, policy: JanusPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(tensors: object) -> None:
        raise OSError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="out of memory"):
        patch.setattr(at_version_0, "install", break_down)
        at_version_0.load_weights(1, weights_of(policy))
    with pytest.raises(RuntimeError, match="half of a weight update"):
        at_version_0.generate([request(TEXTS[0], (1,))])
    at_version_0.load_weights(2, weights_of(policy))
    assert at_version_0.generate([request(TEXTS[0], (1,))])[0].policy_version == 2


def test_an_unknown_engine_setup_without_vllm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="make install"):
        build_engine(PolicyConfig.model_validate({"path": "x"}), rollout("vllm"), worker="w")
