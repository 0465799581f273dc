"""What LlamaGen's files and prompts may not be is said in a sentence: the file, the tensor, the class, the line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants, hf_api
from transformers import T5Config, T5EncoderModel

from stage_ray.cli import main
from stage_ray.commands.plan import model_sizes
from stage_ray.config import PolicyConfig
from stage_ray.config.load import load_config, validate_config
from stage_ray.config.model_sizes import BFLOAT16, FLAN_T5_XL, KNOWN
from stage_ray.config.shipped import shipped_configs
from stage_ray.engines.memory import rollout_memory
from stage_ray.errors import ConfigError
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.policies import load_policy
from stage_ray.policies.llamagen import LlamaGenPolicy
from stage_ray.policies.llamagen.classes import ClassNames, imagenet
from stage_ray.policies.llamagen.model import LlamaGenConfig, LlamaGenModel
from stage_ray.policies.llamagen.published import MODELS, TOKENIZERS
from stage_ray.policies.llamagen.sizes import config_sizes
from stage_ray.policies.llamagen.text import clean
from stage_ray.policies.reference import check_reference
from tests.hub import served
from tests.policies.llamagen import MODEL, TOKENIZER, publish
from tests.runs import tiny_run

QKV, HEAD, CODES = "layers.1.attention.wqkv.weight", "output.weight", "quantize.embedding.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published")
    publish(directory / "source", "class")
    assert main(["convert", str(directory / "source"), str(directory / "class")]) == 0
    publish(directory / "captions", "text")
    assert main(["convert", str(directory / "captions"), str(directory / "text")]) == 0
    return directory


@pytest.fixture
def source(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published / "source", tmp_path / "source"))


def weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = MODEL["class"]) -> None:
    held = torch.load(directory / file, weights_only=False)
    change(held["model"])
    torch.save(held, directory / file)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class Custom:
    """What a pickle may hold beside tensors."""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: truncate(d / MODEL["class"]), f"{MODEL['class']} is cut short or damaged"),
        (lambda d: torch.save({"model": {"a": Custom()}}, d / TOKENIZER), f"{TOKENIZER} holds more than tensors"),
        (lambda d: weights(d, lambda t: t.pop(HEAD)), "lacks 1 tensors, the first is what becomes gpt.head.weight"),
        (lambda d: weights(d, lambda t: t.pop("norm.weight")), "what becomes gpt.transformer.norm.weight"),
        (lambda d: weights(d, lambda t: t.pop("tok_embeddings.weight")), "lack tensor 'tok_embeddings.weight'"),
        (lambda d: weights(d, lambda t: t.update(extra=t[HEAD].clone())), "tensor extra has no place in the model"),
        (lambda d: weights(d, lambda t: t.update({QKV: t[QKV][:5].clone()})), f"tensor {QKV} has no place"),
        (lambda d: weights(d, lambda t: t.update({HEAD: t[HEAD][:5].clone()})), f"tensor {HEAD} makes gpt.head.weight"),
        (
            lambda d: weights(d, lambda t: t.update({CODES: t[CODES][:5].clone()}), TOKENIZER),
            f"tensor {CODES} makes vq.{CODES} [5, 8], but config.json makes it [48, 8]",
        ),
        (
            lambda d: weights(d, lambda t: t[HEAD].view(-1)[:2].fill_(float("nan"))),
            f"tensor {HEAD} holds 2 values that",
        ),
        (lambda d: (d / TOKENIZER).unlink(), "one vq*.pt is needed, and none was found"),
        (
            lambda d: shutil.copy(d / TOKENIZER, d / "vq_other.pt"),
            f"one vq*.pt is needed, and {TOKENIZER}, vq_other.pt",
        ),
        (lambda d: (d / "config.json").unlink(), "which is no published size; say num_attention_heads"),
        (lambda d: (d / MODEL["class"]).rename(d / "c2i_tiny.pt"), "does not say how large its images are"),
    ],
)
def test_what_cannot_be_converted_is_a_sentence_and_exit_code_2(source, change, sentence, capsys):
    change(source)
    assert main(["convert", str(source), str(source.parent / "out")]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not (source.parent / "out").exists()


def test_of_several_models_the_named_files_are_taken(source, capsys):
    shutil.copy(source / TOKENIZER, source / "vq_other.pt")
    shutil.copy(source / MODEL["class"], source / "c2i_other_032.pt")
    command = ["convert", str(source), str(source.parent / "out"), "--file", MODEL["class"], "--file"]
    assert main([*command, "vq_third.pt"]) == 2
    assert "holds no vq_third.pt, which --file names" in capsys.readouterr().err
    assert main([*command, "vq_other.pt"]) == 0
    assert main(["convert", str(source.parent / "out"), str(source.parent / "again")]) == 2
    assert "is in transformers' layout already" in capsys.readouterr().err


def test_a_model_that_is_saved_and_loaded_is_the_same(published, tmp_path):
    model = LlamaGenModel.from_pretrained(published / "text", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again, report = LlamaGenModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and again.config.condition == "text" and again.dtype == torch.bfloat16
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_checkpoint_without_a_tensor_or_its_text_encoder_is_refused_before_anything_is_loaded(published, tmp_path):
    for kind, sentence in (("class", "lacks 1 tensors, the first is gpt.head.weight"), ("text", "is not a directory")):
        broken = Path(shutil.copytree(published / kind, tmp_path / kind))
        if kind == "class":
            model = LlamaGenModel.from_pretrained(broken)
            del model.gpt["head"]
            model.save_pretrained(broken)
        else:
            said = json.loads((broken / "config.json").read_text()) | {"text_encoder": str(broken / "config.json")}
            (broken / "config.json").write_text(json.dumps(said))
        with pytest.raises(ConfigError, match=sentence):
            codec = LlamaGenPolicy.check(PolicyConfig(family="llamagen", path=str(broken)))
            assert codec is not None
            codec.encode_prompt("a red circle")


def test_classes_are_numbers_names_or_a_sentence_around_a_name():
    names = ClassNames(imagenet(), 1000)
    assert len(imagenet()) == 1000 and [names.number(line) for line in imagenet()] == list(range(1000))
    asked = {"207": 207, "Golden Retriever": 207, "a photo of a goldfish.": 1, "the hen": 8, "an image of an ox": 345}
    asked |= {"Carassius auratus": 1, "crane bird": 134, "cardigan": 474, "tank suit": 639}
    assert {text: names.number(text) for text in asked} == asked
    for text, sentence in {
        "crane": "'crane' is no class of one meaning",
        "goldfsh": "did you mean 'goldfish', or give its number, 0 to 999",
        "1000": "numbered 0 to 999",
        "-1": "is no class",
        "a photo of two hens": "is no class",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            names.number(text)


@pytest.mark.parametrize(
    ("caption", "written"),
    [
        ("A photo of  two Cats,sitting", "a photo of two cats, sitting"),
        ("“Big” <b>dog</b> (red)", '"big" dog red'),
        ("see https://example.org/a.png now", "see now"),
        ("a—b,", "a-b"),
    ],
)
def test_captions_are_written_as_the_text_encoder_saw_them(caption, written):
    assert clean(caption) == written


def test_a_caption_is_its_tokens_by_themselves_and_one_that_is_too_long_is_refused(published):
    policy = load_policy(PolicyConfig(family="llamagen", path=str(published / "text")), device=torch.device("cpu"))
    codec = policy.codec
    prompt = codec.encode_prompt("A red circle")
    assert len(prompt.conditional) == 4 and prompt.unconditional == (-4, -3, -2, -1)  # three words and the end
    assert torch.equal(codec.prompt_features(prompt.unconditional), codec.unconditional[-4:])
    with pytest.raises(ValueError, match="caption of 14 tokens, at most 12 fit this model"):
        codec.encode_prompt("red " * 13)


def test_a_reference_has_the_same_classes(published, tmp_path):
    config = PolicyConfig(family="llamagen", path=str(published / "class"), reference=str(published / "class"))
    check_reference(config)
    other = Path(shutil.copytree(published / "class", tmp_path / "other"))
    said = json.loads((other / "config.json").read_text()) | {"class_names": [f"thing {n}" for n in range(1000)]}
    (other / "config.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match="prompt tokens differ"):
        check_reference(config.model_copy(update={"reference": str(other)}))


def test_an_unknown_class_is_refused_by_its_line_before_anything_starts(published, tmp_path, capsys):
    prompts = tmp_path / "classes.jsonl"
    prompts.write_text('{"class": 7}\n{"class": "golfish"}\n{"prompt": "a photo of a hen"}\n{"class": 1000}\n')
    where = {"train": str(prompts), "heldout": str(prompts)}
    run = tiny_run(tmp_path, published / "class", policy={"family": "llamagen"}, prompts=where)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err
    assert "2 of 4 prompts cannot be drawn" in said and "classes.jsonl, line 2" in said
    assert "'golfish' is no class of one meaning; did you mean 'goldfish'" in said and "1000 is no class" in said
    assert not (tmp_path / "run").exists()


PUBLISHED = {  # ``GPT_models``: width, layers, heads
    "llamagen-b-256": (768, 12, 12, 16, 1),
    "llamagen-l-256": (1024, 24, 16, 16, 1),
    "llamagen-l-384": (1024, 24, 16, 24, 1),
    "llamagen-xl-384": (1280, 36, 20, 24, 1),
    "llamagen-t2i-256": (1280, 36, 20, 16, 120),
    "llamagen-t2i-512": (1280, 36, 20, 32, 120),
}


@pytest.mark.parametrize("name", [name for name in KNOWN if name.startswith("llamagen")])
def test_a_published_model_has_as_many_parameters_as_its_modules(name):
    hidden, layers, heads, side, prompt = PUBLISHED[name]
    inner = {768: 2048, 1024: 2816, 1280: 3584}[hidden]
    config = LlamaGenConfig(
        condition="class" if prompt == 1 else "text",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        side=side,
        prompt_tokens=prompt,
        text_encoder="google/flan-t5-xl",
    )
    assert config_sizes(config, name, KNOWN[name].path) == KNOWN[name]
    with torch.device("meta"):
        assert KNOWN[name].total == sum(p.numel() for p in LlamaGenModel(config).parameters())


def test_a_directory_can_be_planned_and_its_config_names_the_family(published, capsys):
    found = model_sizes(str(published / "class"))
    model = LlamaGenModel.from_pretrained(published / "class")
    assert found.trained == sum(p.numel() for name, p in model.named_parameters() if name.startswith("gpt."))
    assert replace(found, path="") == replace(config_sizes(model.config, "class", ""))
    assert main(["plan", "--model", "llamagen-t2i-256", "--gpus", "8", "--yaml"]) == 0
    said = yaml.safe_load(capsys.readouterr().out)
    assert said["policy"] == {"family": "llamagen", "path": "models/llamagen-t2i-256"}


def test_a_text_encoder_of_a_hub_is_fetched_with_the_run_and_not_by_its_dry_run(
    published, tmp_path, capsys, monkeypatch
):
    model = Path(shutil.copytree(published / "text", tmp_path / "model"))
    said = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(said | {"text_encoder": "me/t5"}))
    run = tiny_run(tmp_path, model, policy={"family": "llamagen"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with served() as hub:
        hub.commit("models/me/t5", Path(said["text_encoder"]), "main")
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        place = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.address)
        assert main(["train", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
        assert "would be fetched: policy.path: text_encoder = me/t5" in capsys.readouterr().out and not hub.asked
        assert main(["fetch", str(tmp_path / "run.yaml")]) == 0
        assert "policy.path: text_encoder = " in capsys.readouterr().out
    assert main(["train", str(tmp_path / "run.yaml"), "--dry-run", "--strict"]) == 0
    codec = LlamaGenPolicy.check(run.policy)
    assert codec is not None and len(codec.encode_prompt("a red circle").conditional) == 4


CONFIGS = {"b": "llamagen-b-256", "l": "llamagen-l-256", "xl": "llamagen-xl-384", "t2i": "llamagen-t2i-256"}


@pytest.mark.parametrize(("config", "model"), CONFIGS.items())
def test_the_papers_runs_have_its_numbers_and_the_split_of_gpus_that_plan_computes(config, model, capsys):
    name, text = f"llamagen_{config}_ar_grpo", config == "t2i"
    run = load_config(name)
    algorithm, rollout = run.algorithm.model_dump(), run.rollout
    paper = (600, 1.0, 4.0, 8) if text else (400, 0.1, 2.0, 4)  # arXiv 2508.06924
    assert (run.steps, algorithm["beta"], rollout.guidance_scale, rollout.groups_per_step) == paper
    assert (run.recipe, run.learner.lr, rollout.group_size, rollout.top_k) == ("ar_grpo", 1e-5, 8, 0)
    groups = ["--groups-per-step", str(rollout.groups_per_step)]
    assert main(["plan", "--model", model, "--gpu", "a100-40gb", "--gpus", "4", *groups, "--yaml"]) == 0
    plan = validate_config(yaml.safe_load(capsys.readouterr().out))
    assert (run.policy.family, run.policy.path) == (plan.policy.family, plan.policy.path)
    assert (rollout.workers, run.learner.ranks) == (plan.rollout.workers, plan.learner.ranks)
    assert (rollout.images_per_batch, rollout.gpu_memory_utilization) == (
        plan.rollout.images_per_batch,
        plan.rollout.gpu_memory_utilization,
    )
    assert run.learner.micro_batch_images == plan.learner.micro_batch_images
    written = shipped_configs()[name].read_text()
    files = re.findall(r"--file (\S+)", written)
    assert [bool(kind.fullmatch(file)) for kind, file in zip((MODELS, TOKENIZERS), files, strict=True)] == [True, True]
    if not text:
        assert len(load_prompts(run.prompts.train)) == 1000


def test_the_text_encoder_is_as_large_as_flan_t5_xls():
    wide = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}  # its config.json
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**wide, vocab_size=32128, feed_forward_proj="gated-gelu"))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == FLAN_T5_XL
    memory = rollout_memory(KNOWN["llamagen-t2i-256"], images=8, dtype="bfloat16")
    assert memory["text encoder"] == BFLOAT16 * (FLAN_T5_XL + 2 * 8 * 120 * wide["d_model"])
