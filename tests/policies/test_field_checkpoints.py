"""Checkpoints as people have them: what transformers loads is loaded as it does, the rest is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, GenerationConfig, JanusForConditionalGeneration

from stage_ray.cli import main
from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies import load_policy, policy_class
from stage_ray.pretrained import weight_files

CPU = torch.device("cpu")
LAYER = "model.language_model.layers.1.mlp.down_proj.weight"
HEAD = "model.generation_head.vision_head.weight"
EMBEDDING, TEXT_HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
CHAT = [{"role": "user", "content": [{"type": "text", "text": "a photo of a red circle"}]}]


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "janus"))


def edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def vq_config(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text())["vq_config"])


def load(path: Path, **settings: str):
    return load_policy(PolicyConfig.model_validate({"path": str(path), **settings}), device=CPU)


def refused(path: Path) -> str:
    """What a run says of a model before it starts anything."""
    with pytest.raises(ConfigError) as caught:
        policy_class(PolicyConfig(path=str(path))).check(PolicyConfig(path=str(path)))
    return str(caught.value)


def unconditional_branch(path: Path) -> list[int]:
    """Transformers' own, read from the ids that its model embeds while it generates."""
    model = JanusForConditionalGeneration.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path)
    chat = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    inputs = processor(text=[chat], generation_mode="image", return_tensors="pt")
    seen = []
    embed = model.get_input_embeddings()
    embed.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    model.generate(**inputs, generation_mode="image", do_sample=True)
    (both,) = [ids for ids in seen if ids.shape[0] == 2][:1]
    return both[1].tolist()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"pad_token": None}),
        ("generation_config.json", {"pad_token_id": 2}),
        ("generation_config.json", {"bos_token_id": 7}),
    ],
)
def test_the_unconditional_branch_has_the_ids_that_transformers_generates_with(copy, file, changes):
    edit(copy / file, **changes)
    ids = load(copy).codec.encode_prompt("a photo of a red circle")
    assert list(ids.unconditional) == unconditional_branch(copy)


def test_without_a_generation_config_the_ids_are_the_tokenizers(copy, model):
    (copy / "generation_config.json").unlink()
    text = "a photo of a red circle"
    assert load(copy).codec.encode_prompt(text) == load(model).codec.encode_prompt(text)


def test_one_file_is_read_before_the_shards_that_it_was_saved_over(copy):
    model = JanusForConditionalGeneration.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="100KB")
    assert len(weight_files(copy)) > 1
    with torch.no_grad():
        model.get_parameter(LAYER).fill_(0.5)
    model.save_pretrained(copy / "new")
    shutil.copy(copy / "new" / "model.safetensors", copy)  # the index of the shards stays
    assert weight_files(copy) == [copy / "model.safetensors"]
    assert (load(copy).model.get_parameter(LAYER) == 0.5).all()


def test_a_checkpoint_in_shards_is_loaded_and_exported_in_shards(copy, tmp_path):
    whole = JanusForConditionalGeneration.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    whole.save_pretrained(copy, max_shard_size="100KB")
    policy = load(copy)
    policy.save(tmp_path / "final")
    assert [file.name for file in weight_files(tmp_path / "final")] == [file.name for file in weight_files(copy)]
    again = JanusForConditionalGeneration.from_pretrained(tmp_path / "final").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("name", [LAYER, HEAD, "model.vqmodel.decoder.conv_out.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_file_and_name(copy, name, value, capsys, tmp_path):
    weights(copy, lambda tensors: tensors[name].view(-1)[:2].fill_(value))
    command = ["generate", str(copy), "--prompt", "a ring", "--images", "1", "--engine", "torch"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"tensor {name} holds 2 values that are not finite" in said and str(copy) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: weights(d, lambda t: t.pop(LAYER)), f"lacks 1 tensors, the first is {LAYER}"),
        (lambda d: weights(d, lambda t: t.update({LAYER: t[LAYER][:5].clone()})), f"tensor {LAYER} is [5, 128], but"),
        (
            lambda d: edit(d / "config.json", vq_config=vq_config(d) | {"num_embeddings": 24}),
            "tensor model.vqmodel.quantize.embedding.weight is [48, 8], but config.json makes it [24, 8]",
        ),
        (
            lambda d: edit(
                d / "tokenizer_config.json",
                extra_special_tokens=None,
                model_specific_special_tokens=None,
                image_token=None,
                boi_token=None,
                eoi_token=None,
            ),
            "names no image tokens",
        ),
        (lambda d: (d / "adapter_config.json").write_text("{}"), "base_model_name_or_path = None names no base"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin alone, a pickle"),
        (lambda d: edit(d / "config.json", model_type="multi_modality"), "DeepSeek's own code"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not readable JSON"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "does not load as a Janus model"),
        (lambda d: (d / "chat_template.jinja").unlink(), "has no chat template"),
    ],
)
def test_what_cannot_be_used_is_a_sentence_before_anything_starts(copy, change, sentence):
    change(copy)
    assert sentence in refused(copy)


def test_an_export_is_the_checkpoint_with_other_weights(copy, tmp_path):
    """Also where transformers itself refuses to write the generation config, and in the checkpoint's own dtype."""
    edit(copy / "generation_config.json", do_sample=False, temperature=0.7, top_p=0.95)
    weights(copy, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items() if "vqmodel" not in k}))
    policy = load(copy)
    with torch.no_grad():
        policy.model.get_parameter(LAYER).add_(1)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "half.json").touch()  # of an export that was cut off
    policy.save(tmp_path / "final")
    assert {file.name for file in (tmp_path / "final").iterdir()} == {file.name for file in copy.iterdir()}
    for file in copy.iterdir():
        if file.name != "model.safetensors":
            assert (tmp_path / "final" / file.name).read_bytes() == file.read_bytes()
    before, after = (load_file(directory / "model.safetensors") for directory in (copy, tmp_path / "final"))
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert changed == [LAYER]
    policy.save(tmp_path / "exact", dtype=torch.float32)
    assert load_file(tmp_path / "exact" / "model.safetensors")[LAYER].dtype == torch.float32
    assert GenerationConfig.from_pretrained(tmp_path / "final").temperature == 0.7


@pytest.mark.parametrize("stored", [[EMBEDDING], [TEXT_HEAD], [EMBEDDING, TEXT_HEAD]])
def test_a_text_head_that_is_tied_to_the_embedding_stays_so(copy, tmp_path, stored):
    """Under whichever of the two names the checkpoint has it."""
    embedding = load_file(copy / "model.safetensors")[EMBEDDING]

    def store(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[EMBEDDING]
        tensors.update({name: embedding.clone() for name in stored})

    weights(copy, store)
    policy = load(copy)
    with torch.no_grad():
        policy.trained_parameters()[EMBEDDING].add_(1)
    policy.save(tmp_path / "final", dtype=torch.float32)
    found = load_file(tmp_path / "final" / "model.safetensors")
    assert sorted(found.keys() & {EMBEDDING, TEXT_HEAD}) == sorted(stored)
    assert all(torch.equal(found[name], embedding + 1) for name in stored)
    again = JanusForConditionalGeneration.from_pretrained(tmp_path / "final")
    assert again.lm_head.weight is again.get_parameter(EMBEDDING)


def test_a_text_head_that_differs_from_the_embedding_stays_as_it_came(copy, tmp_path):
    """As in transformers, whatever the config says."""
    weights(copy, lambda tensors: tensors.update({TEXT_HEAD: tensors[EMBEDDING] - 1}))
    before = load_file(copy / "model.safetensors")
    policy = load(copy)
    with torch.no_grad():
        policy.trained_parameters()[EMBEDDING].add_(1)
    policy.save(tmp_path / "final")
    after = load_file(tmp_path / "final" / "model.safetensors")
    assert torch.equal(after[TEXT_HEAD], before[TEXT_HEAD])
    assert torch.equal(after[EMBEDDING], before[EMBEDDING] + 1)


@pytest.mark.parametrize("template", ["official", "paper"])
def test_an_export_has_the_prompts_that_it_was_trained_on(model, tmp_path, template):
    policy = load(model, template=template)
    policy.save(tmp_path / "final")
    wanted = policy.codec.encode_prompt("a photo of a red circle")
    assert load(tmp_path / "final").codec.encode_prompt("a photo of a red circle") == wanted
    processor = AutoProcessor.from_pretrained(tmp_path / "final")
    chat = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    assert [int(i) for i in processor(text=[chat], generation_mode="image")["input_ids"][0]] == [*wanted.conditional]
