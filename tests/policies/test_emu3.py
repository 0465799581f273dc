"""Emu3 says what transformers' own Emu3 says, row ends included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Emu3ForConditionalGeneration

from stage_ray.config import PolicyConfig
from stage_ray.engines import build_engine
from stage_ray.policies import load_policy
from stage_ray.policies.emu3 import Emu3Policy
from stage_ray.samplers import Context, SamplingParams, process_logits
from tests.engines.test_engines import request, rollout
from tests.policies.emu3 import CODES, COLUMNS, ROWS, TEXTS, Original, tiny_emu3
from tests.policies.families import FAMILIES, moved

CPU = torch.device("cpu")
NEGATIVE = "lowres, bad"


def config(path: Path) -> PolicyConfig:
    return PolicyConfig.model_validate({"path": str(path), "family": "emu3"})


def in_memory(name: str) -> str:
    """What transformers calls a trained tensor of a checkpoint once it is loaded."""
    return name.replace("text_model.model.", "model.text_model.")


def policy_at(path: Path) -> Emu3Policy:
    policy = load_policy(config(path), device=CPU)
    assert isinstance(policy, Emu3Policy)
    return policy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_emu3(tmp_path_factory.mktemp("emu3") / "model")


@torch.no_grad()
def test_logits_of_both_branches_are_those_of_transformers_after_rows_that_are_closed(checkpoint: Path) -> None:
    original, policy = Original(checkpoint), policy_at(checkpoint)
    tokens = torch.randint(0, CODES, (len(TEXTS), ROWS * COLUMNS), generator=torch.Generator().manual_seed(1))
    prompts = [policy.codec.encode_prompt(text) for text in TEXTS]
    assert all(
        list(ids.conditional) == original.prompt(text)[0].tolist() for ids, text in zip(prompts, TEXTS, strict=True)
    )
    assert {len(ids.unconditional) for ids in prompts}.isdisjoint(len(ids.conditional) for ids in prompts)
    for branch, texts in (("conditional", TEXTS), ("unconditional", [NEGATIVE] * len(TEXTS))):
        found = policy.image_logits([getattr(ids, branch) for ids in prompts], tokens)
        expected = torch.stack([original.logits(text, row) for text, row in zip(texts, tokens, strict=True)])
        assert expected.std() > 0.5
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_guided_drawing_and_pictures_are_those_of_transformers_generate(checkpoint: Path) -> None:
    original, policy = Original(checkpoint), policy_at(checkpoint)
    tokens, logprobs, picture = original.generate(TEXTS[0], NEGATIVE, guidance=3.0)
    ids, count = policy.codec.encode_prompt(TEXTS[0]), ROWS * COLUMNS
    logits = [policy.image_logits([branch], tokens[None])[0] for branch in (ids.conditional, ids.unconditional)]
    context = Context(torch.arange(count), tokens.repeat(count, 1))
    guided = process_logits(*logits, SamplingParams(guidance_scale=3.0), context)
    torch.testing.assert_close(guided.log_softmax(-1), logprobs, rtol=0, atol=1e-4)

    engine = build_engine(config(checkpoint), rollout("torch"), worker="test")
    greedy = SamplingParams(guidance_scale=3.0, temperature=1e-5)
    group = engine.generate([request(TEXTS[0], (3,))], greedy)[0]
    assert group.tokens[0].tolist() == tokens.tolist()
    shown = original.processor.postprocess([picture], return_tensors="PIL.Image.Image")["pixel_values"][0]
    assert group.images.shape == (1, 8 * ROWS, 8 * COLUMNS, 3) and group.images.std() > 1
    assert np.array_equal(group.images[0], np.asarray(shown))
    engine.close()


@torch.no_grad()
def test_pictures_are_encoded_as_transformers_encodes_them(checkpoint: Path) -> None:
    original, codec = Original(checkpoint), policy_at(checkpoint).codec
    patches = np.random.default_rng(0).choice([0, 255], (2, ROWS, COLUMNS, 3)).astype(np.uint8)
    pictures = patches.repeat(8, axis=1).repeat(8, axis=2)
    assert codec.vqmodel is not None
    for model in (original.model.model.vqmodel, codec.vqmodel):  # a new encoder tells no patches apart
        for parameter in model.encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    read = original.processor.image_processor(list(pictures), do_resize=False, return_tensors="pt")
    expected = original.model.model.vqmodel.encode(read["pixel_values"], read["image_sizes"]).image_tokens
    found = codec.encode(torch.from_numpy(pictures))
    assert found.tolist() == [tokens.flatten().tolist() for tokens in expected]
    assert len(found.unique()) > 1 and found.min() >= 0 and found.max() < CODES


def test_what_is_saved_loads_in_plain_transformers_with_nothing_missing_or_unknown(
    checkpoint: Path, tmp_path: Path
) -> None:
    trained = load_policy(config(moved(checkpoint, tmp_path / "saved", FAMILIES["emu3"])), device=CPU)
    saved, report = Emu3ForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = Emu3ForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    expected = {in_memory(name): tensor for name, tensor in trained.trained_parameters().items()}
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, expected.get(name, before[name]))
        assert torch.equal(tensor, before[name]) == (not name.startswith("model.text_model.")), name


def test_gradients_are_those_of_transformers_also_recomputed(checkpoint: Path) -> None:
    tokens = torch.randint(0, CODES, (2, ROWS * COLUMNS), generator=torch.Generator().manual_seed(2))
    model, first = Emu3ForConditionalGeneration.from_pretrained(checkpoint).eval(), policy_at(checkpoint).codec.first
    prompt = policy_at(checkpoint).codec.encode_prompt(TEXTS[0]).conditional
    image = torch.stack([model.vocabulary_mapping.convert_img2bpe(one.view(ROWS, COLUMNS)).view(-1) for one in tokens])
    logits = model(input_ids=torch.cat([torch.tensor([prompt] * 2), image], dim=1)).logits[:, len(prompt) - 1 : -1]
    drawn = logits[..., first : first + CODES].unflatten(1, (ROWS, COLUMNS + 1))[:, :, :-1].flatten(1, 2)
    drawn.log_softmax(-1).gather(-1, tokens[..., None]).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for checkpointing in (False, True):
        policy = policy_at(checkpoint)
        if checkpointing:
            policy.enable_gradient_checkpointing()
        policy.token_logprobs([prompt] * 2, tokens).logprobs.sum().backward()
        for name, parameter in policy.trained_parameters().items():
            wanted = expected[in_memory(name)]
            assert wanted.abs().max() > 0
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-4)
