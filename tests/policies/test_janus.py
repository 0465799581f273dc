"""The Janus policy says what plain transformers says, trains the language model only, refuses broken checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoProcessor, JanusForConditionalGeneration

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies import base, load_policy
from stage_ray.policies.janus import JanusPolicy
from stage_ray.policies.logprobs import token_logprobs
from tests.tiny import CODES, IMAGE_SIZE, IMAGE_TOKENS, tiny_janus

CPU = torch.device("cpu")
TEXTS = ("a photo of a red circle", "a photo of a square left of a triangle", "circle")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_janus(tmp_path_factory.mktemp("tiny") / "janus")


@pytest.fixture(scope="module")
def policy(directory: Path) -> JanusPolicy:
    return load(directory)


def load(path: Path, **settings: str) -> JanusPolicy:
    policy = load_policy(PolicyConfig.model_validate({"path": str(path), **settings}), device=CPU)
    assert isinstance(policy, JanusPolicy)
    return policy


def some_tokens(count: int) -> torch.Tensor:
    return torch.randint(0, CODES, (count, IMAGE_TOKENS), generator=torch.Generator().manual_seed(1))


def test_prompt_ids_are_what_the_processor_of_transformers_makes(directory: Path, policy: JanusPolicy) -> None:
    processor = AutoProcessor.from_pretrained(directory)
    for text in TEXTS:
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        chat = processor.apply_chat_template(messages, add_generation_prompt=True)
        expected = processor(text=[chat], generation_mode="image")["input_ids"][0].tolist()
        assert list(policy.codec.encode_prompt(text).conditional) == expected


def test_the_unconditional_branch_keeps_bos_and_boi_and_blanks_the_rest(policy: JanusPolicy) -> None:
    tokenizer = policy.codec.processor.tokenizer
    ids = policy.codec.encode_prompt(TEXTS[0])
    boi = tokenizer.convert_tokens_to_ids(tokenizer.boi_token)
    inner = [tokenizer.pad_token_id] * (len(ids.conditional) - 2)
    assert list(ids.unconditional) == [tokenizer.bos_token_id, *inner, boi]


def test_the_papers_template_writes_roles_as_plain_words(directory: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(directory).tokenizer
    official = tokenizer.convert_ids_to_tokens(load(directory).codec.encode_prompt("circle").conditional)
    paper = tokenizer.convert_ids_to_tokens(load(directory, template="paper").codec.encode_prompt("circle").conditional)
    assert [{"<|User|>": "User", "<|Assistant|>": "Assistant"}.get(token, token) for token in official] == paper


def test_logits_are_those_of_transformers_for_each_prompt_alone(policy: JanusPolicy) -> None:
    """A reference written with transformers' own calls, one row at a time: no padding anywhere."""
    model, tokens = policy.model, some_tokens(3)
    prompts = [policy.codec.encode_prompt(text).conditional for text in TEXTS]
    found = policy.image_logits(prompts, tokens)
    for row, prompt in enumerate(prompts):
        text = model.get_input_embeddings()(torch.tensor([prompt]))
        image = model.prepare_embeddings_for_image_generation(tokens[row : row + 1, :-1])
        states = model.model.language_model(inputs_embeds=torch.cat((text, image), dim=1)).last_hidden_state
        expected = model.model.generation_head(states[:, len(prompt) - 1 :])[0]
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


def test_statistics_are_the_log_probability_and_entropy_of_the_logits_and_carry_gradients(policy: JanusPolicy) -> None:
    prompts, tokens = [policy.codec.encode_prompt(text).conditional for text in TEXTS], some_tokens(3)
    statistics = policy.token_logprobs(prompts, tokens)
    categorical = torch.distributions.Categorical(logits=policy.image_logits(prompts, tokens))
    torch.testing.assert_close(statistics.logprobs, categorical.log_prob(tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(statistics.entropy, categorical.entropy(), atol=1e-5, rtol=1e-5)
    assert statistics.logprobs.requires_grad and statistics.entropy.requires_grad


def test_statistics_in_pieces_are_the_statistics_at_once_gradients_too(
    policy: JanusPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, tokens = [policy.codec.encode_prompt(text).conditional for text in TEXTS], some_tokens(3)
    parameter = policy.trained_parameters()["model.language_model.layers.0.mlp.down_proj.weight"]

    def measure() -> tuple[torch.Tensor, torch.Tensor]:
        statistics = policy.token_logprobs(prompts, tokens)
        loss = statistics.logprobs.sum() + statistics.entropy.sum()
        return statistics.logprobs.detach(), torch.autograd.grad(loss, parameter)[0]

    at_once = measure()
    monkeypatch.setattr(base, "LOGITS_AT_ONCE", 1)
    for whole, pieces in zip(at_once, measure(), strict=True):
        torch.testing.assert_close(whole, pieces, atol=1e-4, rtol=1e-4)


def test_a_token_that_cannot_be_adds_nothing_to_the_entropy() -> None:
    statistics = token_logprobs(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([2]))
    assert statistics.logprobs.item() == -torch.inf
    assert statistics.entropy.item() == pytest.approx(0.6931, abs=1e-4)


def test_the_language_model_trains_each_tensor_once_and_nothing_else_does(policy: JanusPolicy) -> None:
    trained = policy.trained_parameters()
    assert len({id(parameter) for parameter in trained.values()}) == len(trained)
    assert set(trained) <= set(policy.model.state_dict())
    assert "model.language_model.embed_tokens.weight" in trained and not any("lm_head" in name for name in trained)
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == name.startswith("model.language_model."), name


def test_the_codebook_is_what_the_decoder_is_given(policy: JanusPolicy) -> None:
    side = int(IMAGE_TOKENS**0.5)
    tokens = some_tokens(1)
    given = policy.model.model.vqmodel.quantize.get_codebook_entry(tokens)  # [1, D, side, side]
    expected = policy.codec.codebook()[tokens].view(1, side, side, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(policy.codec.codebook(), F.normalize(policy.codec.codebook(), dim=-1))


def test_pictures_are_those_of_transformers(directory: Path, policy: JanusPolicy) -> None:
    tokens = some_tokens(20)
    images = policy.codec.decode(tokens)
    assert images.shape == (20, IMAGE_SIZE, IMAGE_SIZE, 3) and images.dtype == torch.uint8
    processor = AutoProcessor.from_pretrained(directory)
    with torch.no_grad():
        decoded = policy.model.decode_image_tokens(tokens).permute(0, 3, 1, 2)  # postprocess wants channels first
    expected = torch.stack([torch.as_tensor(x) for x in processor.postprocess(list(decoded))["pixel_values"]])
    assert (images.int() - expected.permute(0, 2, 3, 1).int()).abs().max() <= 1


def test_what_is_saved_loads_and_draws_in_plain_transformers(policy: JanusPolicy, tmp_path: Path) -> None:
    policy.save(tmp_path / "saved")
    model = JanusForConditionalGeneration.from_pretrained(tmp_path / "saved")
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    messages = [{"role": "user", "content": [{"type": "text", "text": TEXTS[0]}]}]
    chat = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[chat], generation_mode="image", return_tensors="pt")
    tokens = model.generate(**inputs, generation_mode="image", do_sample=True)
    assert tokens.shape == (1, IMAGE_TOKENS) and model.decode_image_tokens(tokens).shape[-1] == 3
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def broken_copy(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    return target


def test_a_directory_that_is_not_there_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(Path("/nowhere/janus"))


def test_a_checkpoint_without_weights_is_named(directory: Path, tmp_path: Path) -> None:
    path = broken_copy(directory, tmp_path / "copy")
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no model.safetensors"):
        load(path)


def test_a_truncated_weight_file_is_named(directory: Path, tmp_path: Path) -> None:
    path = broken_copy(directory, tmp_path / "copy")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="model.safetensors is cut short or damaged"):
        load(path)


def test_a_shard_that_is_missing_is_named(directory: Path, tmp_path: Path) -> None:
    path = broken_copy(directory, tmp_path / "copy")
    (path / "model.safetensors").unlink()  # where it is there, it alone is read, as in transformers
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-00001.safetensors"}}))
    with pytest.raises(ConfigError, match="model-00001.safetensors is missing"):
        load(path)


def test_another_architecture_is_refused_by_name(directory: Path, tmp_path: Path) -> None:
    path = broken_copy(directory, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ConfigError, match="'llama' model, but policy.family needs 'janus'"):
        load(path)


def test_tensors_that_a_checkpoint_lacks_are_never_made_up(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = broken_copy(directory, tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.generation_head.vision_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks 1 tensors, the first is model.generation_head.vision_head.weight"):
        load(path)
