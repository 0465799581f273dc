"""Weights in DeepSeek's own layout say after conversion what the architecture they are published for says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, JanusForConditionalGeneration

from stage_ray.cli import main
from stage_ray.config import PolicyConfig
from stage_ray.policies import conversion, load_policy
from stage_ray.policies.janus import JanusPolicy
from stage_ray.pretrained import weight_files
from tests.policies.deepseek import CODES, CONFIG, PIXELS, SIDE, MultiModalityCausalLM, publish, register_tiny

TEXT = "a photo of a red circle"
CPU = torch.device("cpu")
LAYER = "language_model.model.layers.1.mlp.down_proj.weight"
QKV = "vision_model.vision_tower.blocks.1.attn.qkv.bias"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    register_tiny(monkeypatch)


@pytest.fixture(scope="module")
def original() -> MultiModalityCausalLM:
    return MultiModalityCausalLM()


@pytest.fixture
def converted(original: MultiModalityCausalLM, tmp_path: Path) -> Path:
    publish(tmp_path / "source", original.state_dict())
    return convert(tmp_path)


def convert(directory: Path, *options: str) -> Path:
    assert main(["convert", str(directory / "source"), str(directory / "out"), *options]) == 0
    assert not [path.name for path in directory.iterdir() if path.name.startswith(".")]
    return directory / "out"


def load(path: Path, **settings: str) -> JanusPolicy:
    policy = load_policy(PolicyConfig.model_validate({"path": str(path), **settings}), device=CPU)
    assert isinstance(policy, JanusPolicy)
    return policy


def some_tokens(count: int) -> torch.Tensor:
    return torch.randint(0, CODES, (count, SIDE**2), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("form", ["model.safetensors", "*.safetensors", "pytorch_model.bin", "*.bin", "weights.pt"])
def test_logits_and_pictures_are_those_of_the_original_architecture(original, tmp_path, form, monkeypatch):
    monkeypatch.setattr(conversion, "SHARD_BYTES", 300_000)
    publish(tmp_path / "source", original.state_dict(), form)
    out = convert(tmp_path)
    assert len(weight_files(out)) > 1 and all(file.stat().st_size < 400_000 for file in weight_files(out))
    policy, tokens = load(out), some_tokens(2)
    prompt = policy.codec.encode_prompt(TEXT).conditional
    found = policy.image_logits([prompt] * 2, tokens)
    expected = torch.stack([original.image_logits(torch.tensor(prompt), row) for row in tokens])
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    pictures = original.gen_vision_model.decode_code(tokens)
    assert pictures.std() > 0.1
    torch.testing.assert_close(policy.codec.vqmodel.decode(tokens), pictures, rtol=0, atol=1e-5)


@torch.no_grad()
def test_plain_transformers_sees_and_encodes_images_as_the_original_does(original, converted):
    model, report = JanusForConditionalGeneration.from_pretrained(converted, output_loading_info=True)
    assert not any(report.values()) and model.dtype == torch.float32
    pixels = torch.rand(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1)) * 2 - 1
    features = model.model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(features, original.image_features(pixels), rtol=0, atol=1e-5)
    latents = model.model.vqmodel.encoder(pixels)
    torch.testing.assert_close(latents, original.gen_vision_model.encoder(pixels), rtol=0, atol=1e-5)
    ids = torch.arange(10)[None]
    expected = original.language_model(ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert model.lm_head.weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize(("template", "roles"), [("official", ("<|User|>", "<|Assistant|>")), ("paper", ())])
def test_prompts_are_written_as_deepseeks_code_writes_them(original, tmp_path, template, roles):
    """Its ``get_prompt`` and ``encode``: role, colon, text, two line ends, role, colon, and the image's beginning."""
    publish(tmp_path / "source", original.state_dict())
    out = convert(tmp_path, "--template", template)
    user, assistant = roles or ("User", "Assistant")
    processor, policy = AutoProcessor.from_pretrained(out), load(out)
    chat = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": TEXT}]}], add_generation_prompt=True
    )
    assert chat == f"{user}: {TEXT}\n\n{assistant}:"
    ids = policy.codec.encode_prompt(TEXT)
    words = ["<｜begin▁of▁sentence｜>", user, ":", *TEXT.split(), assistant, ":", "<begin_of_image>"]
    assert processor.tokenizer.convert_ids_to_tokens(list(ids.conditional)) == words
    blank = ["<｜▁pad▁｜>"] * (len(words) - 2)
    unconditional = processor.tokenizer.convert_ids_to_tokens(list(ids.unconditional))
    assert unconditional == [words[0], *blank, words[-1]]
    assert processor.image_processor.min_size == 7 and processor.num_image_tokens == SIDE**2
    assert load(out, template="paper").codec.encode_prompt(TEXT).conditional[1] == processor.tokenizer.vocab["User"]


def test_weights_that_a_trainer_saved_need_no_processor_files(original, tmp_path):
    """STAGE's and GCPO's: bfloat16, a fuller config, only the tokenizer beside it."""
    source = publish(tmp_path / "source", {n: t.bfloat16() for n, t in original.state_dict().items()}, "*.safetensors")
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        (source / name).unlink()
    more = {"rope_theta": 5000.0, "rope_scaling": None, "tie_word_embeddings": False, "top_k": 50, "_name_or_path": "a"}
    language = CONFIG["language_config"] | more
    (source / "config.json").write_text(json.dumps(CONFIG | {"language_config": language, "tie_word_embeddings": True}))
    out = convert(tmp_path)
    tensors = {name: tensor for file in weight_files(out) for name, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["lm_head.weight"], original.language_model.lm_head.weight.bfloat16())
    config = JanusForConditionalGeneration.from_pretrained(out).config
    assert config.dtype == torch.bfloat16 and config.text_config.rope_parameters["rope_theta"] == 5000
    assert load(out).codec.encode_prompt(TEXT).conditional[0] == 1
    assert AutoProcessor.from_pretrained(out).image_processor.size["height"] == PIXELS


def test_another_dtype_is_that_of_all_weights(original, tmp_path):
    publish(tmp_path / "source", original.state_dict())
    out = convert(tmp_path, "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert JanusForConditionalGeneration.from_pretrained(out).dtype == torch.bfloat16


def test_a_text_head_that_is_tied_may_be_left_out(original, tmp_path):
    weights = {name: tensor for name, tensor in original.state_dict().items() if "lm_head" not in name}
    source = publish(tmp_path / "source", weights)
    language = CONFIG["language_config"] | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(CONFIG | {"language_config": language}))
    model = JanusForConditionalGeneration.from_pretrained(convert(tmp_path))
    assert model.lm_head.weight is model.get_input_embeddings().weight
