"""`stage-ray convert` refuses in a sentence what it cannot convert, and goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_api
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stage_ray.cli import main
from stage_ray.policies import conversion
from tests.hub import served
from tests.policies.deepseek import CONFIG, MultiModalityCausalLM, publish, register_tiny

LAYER = "language_model.model.layers.1.mlp.down_proj.weight"
QKV = "vision_model.vision_tower.blocks.1.attn.qkv.weight"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    register_tiny(monkeypatch)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("published") / "janus", MultiModalityCausalLM().state_dict())


@pytest.fixture
def source(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "source"))


def converted(source: Path, *options: str) -> int:
    return main(["convert", str(source), str(source.parent / "out"), *options])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def edit(directory: Path, **changes: Any) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))


def weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def part(name: str, **params: Any) -> dict[str, Any]:
    return {name: CONFIG[name] | {"params": CONFIG[name]["params"] | params}}


def as_bin(directory: Path, content: object) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(content, directory / "pytorch_model.bin")


class Custom:
    """What a pickle may hold beside tensors."""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda d: weights(d, lambda t: t.pop(LAYER)),
            "lacks 1 tensors, the first is what becomes model.language_model",
        ),
        (lambda d: weights(d, lambda t: t.update(extra=t[LAYER].clone())), "tensor extra has no place in the model"),
        (
            lambda d: weights(d, lambda t: t.update({LAYER: t[LAYER][:5].clone()})),
            f"tensor {LAYER} makes model.{LAYER.replace('.model', '')} [5, 96], but config.json makes it [64, 96]",
        ),
        (lambda d: weights(d, lambda t: t.update({QKV: t[QKV][:7].clone()})), f"tensor {QKV} has no place"),
        (lambda d: edit(d, **part("gen_vision_config", image_token_size=24)), "but config.json makes it [24, 8]"),
        (
            lambda d: weights(d, lambda t: t[LAYER].view(-1)[:2].fill_(float("nan"))),
            f"tensor {LAYER} holds 2 values that",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"\0" * 100), "model.safetensors is cut short or damaged"),
        (lambda d: as_bin(d, {"weight": Custom()}), "pytorch_model.bin holds more than tensors"),
        (lambda d: as_bin(d, [1, 2]), "pytorch_model.bin holds no tensors by name"),
        (lambda d: (d / "model.safetensors").rename(d / "weights.gguf"), "holds no weights"),
        (
            lambda d: (
                (d / "model.safetensors")
                .replace(d / "x")
                .with_name("model.safetensors.index.json")
                .write_text('{"weight_map": {"a": "model-1.safetensors"}}')
            ),
            "model-1.safetensors is missing, though model.safetensors.index.json names it",
        ),
        (lambda d: edit(d, model_type="bagel"), "holds a 'bagel' model; layouts that are converted: DeepSeek's Janus"),
        (lambda d: edit(d, gen_vision_config=None), "has no gen_vision_config.params.n_embed; it is no Janus"),
        (lambda d: edit(d, language_config={"hidden_size": "wide"}), "config.json describes no Janus model: "),
        (
            lambda d: edit(d, **part("vision_config", model_name="sam_b")),
            "model_name = 'sam_b'; known here: siglip_large",
        ),
        (lambda d: edit(d, **part("aligner_config", projector_type="linear")), "projector_type = 'linear'; only"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not readable JSON"),
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json; copy it"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json does not load as a tokenizer"),
        (
            lambda d: (d / "processor_config.json").write_text('{"image_start_tag": "<boi>"}'),
            "tokenizer.json has no token '<boi>'",
        ),
        (lambda d: (d / "adapter_config.json").write_text("{}"), "holds a LoRA adapter"),
        (lambda d: shutil.rmtree(d), "does not exist"),
        (lambda d: (d.parent / "out").mkdir(), "exists already; name another directory"),
    ],
)
def test_what_cannot_be_converted_is_a_sentence_and_exit_code_2(source, change, sentence, capsys):
    change(source)
    assert converted(source) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (source.parent / "out" / "config.json").exists()


def test_a_checkpoint_of_transformers_is_taken_as_it_is(model, tmp_path, capsys):
    assert main(["convert", str(model), str(tmp_path / "out")]) == 2
    assert "is in transformers' layout already; name it in policy.path" in capsys.readouterr().err


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are written from here on, many of them."""
    written: list[str] = []

    def save(tensors: Any, file: Path, **options: Any) -> None:
        written.append(file.name.removesuffix(".tmp"))
        save_file(tensors, file, **options)

    monkeypatch.setattr(conversion, "SHARD_BYTES", 300_000)
    monkeypatch.setattr(conversion, "save_file", save)
    return written


def stop_after(count: int, shards: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The next one is cut off half way."""
    save = conversion.save_file

    def failing(tensors: Any, file: Path, **options: Any) -> None:
        if len(shards) == count:
            file.write_bytes(b"half")
            raise error
        save(tensors, file, **options)

    monkeypatch.setattr(conversion, "save_file", failing)


def test_a_full_disk_is_exit_code_1_and_the_same_command_keeps_what_is_written(source, shards, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(2, shards, patch, SafetensorError("I/O error: No space left on device (os error 28)"))
        assert converted(source) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "same command again" in said and not (source.parent / "out").exists()
    first = shards.copy()
    assert converted(source) == 0
    assert len(first) == 2 and len(set(shards)) == len(shards) > 3, "no shard is written twice"
    whole = Path(shutil.copytree(source, source.parent / "again" / "source"))
    assert converted(whole) == 0
    assert contents(source.parent / "out") == contents(whole.parent / "out")


@pytest.mark.parametrize(
    "change",
    [
        lambda source, shard: shard.write_bytes(shard.read_bytes()[:-1] + b"x"),
        lambda source, shard: (shard.parent / "progress.json").unlink(),
        lambda source, shard: weights(source, lambda t: t[LAYER].add_(1)),
    ],
)
def test_a_shard_that_is_not_the_one_recorded_is_written_again(source, shards, change, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(1, shards, patch, KeyboardInterrupt())
        assert converted(source) == 130
    partial = source.parent / ".out.partial"
    change(source, partial / shards[0])
    assert converted(source) == 0
    assert shards.count(shards[0]) == 2 and not partial.exists()
    expected = load_file(source / "model.safetensors")[LAYER]
    found = {n: t for file in (source.parent / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    assert torch.equal(found["model.language_model.layers.1.mlp.down_proj.weight"], expected)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(source, shards, monkeypatch, capsys):
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert converted(source) == 1
    assert "GB are free" in capsys.readouterr().err and not shards


def test_a_source_of_a_hub_is_downloaded_with_its_pickles(source, tmp_path, monkeypatch):
    as_bin(source, load_file(source / "model.safetensors"))
    monkeypatch.chdir(tmp_path)
    with served() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        url = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hf_api.api, "endpoint", hub.address)
        hub.commit("models/me/janus", source, "main")
        assert main(["convert", "me/janus@main", "models/janus"]) == 0
    assert (tmp_path / "models" / "janus" / "model.safetensors").is_file()
