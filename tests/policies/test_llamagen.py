"""LlamaGen's published files say after conversion what their own architecture says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as processes

from stage_ray.cli import main
from stage_ray.config import PolicyConfig
from stage_ray.learner.learner import Learner
from stage_ray.learner.ranks import Ranks
from stage_ray.policies import load_policy
from stage_ray.policies.decoding import EmbedsPrompts
from stage_ray.policies.image_tokenizer import PictureDecoder
from stage_ray.policies.llamagen import LlamaGenPolicy
from tests import learner_case
from tests.policies.deepseek import CODES, PIXELS, SIDE, VQ
from tests.policies.families import FAMILIES, drawn
from tests.policies.llamagen import CLASSES, TEXTS, Transformer, publish
from tests.ray_head import free_port

CPU = torch.device("cpu")
CONDITIONS = ["class", "text"]


def convert(directory: Path, *options: str) -> Path:
    assert main(["convert", str(directory / "source"), str(directory / "out"), *options]) == 0
    return directory / "out"


def config(path: Path, **changes: str) -> PolicyConfig:
    return PolicyConfig.model_validate({"path": str(path), "family": "llamagen", **changes})


def policy_at(path: Path) -> LlamaGenPolicy:
    policy = load_policy(config(path), device=CPU)
    assert isinstance(policy, LlamaGenPolicy)
    return policy


def some_tokens(count: int) -> torch.Tensor:
    return torch.randint(0, CODES, (count, SIDE**2), generator=torch.Generator().manual_seed(1))


def originals_logits(original: Transformer, policy: LlamaGenPolicy, texts, tokens) -> list[torch.Tensor]:
    """What the original makes of tokens: conditional and unconditional logits."""
    ids = [policy.codec.encode_prompt(text) for text in texts]
    if original.condition == "class":
        return [
            original.of_classes(numbers, tokens) for numbers in ([i.conditional[0] for i in ids], [CLASSES] * len(ids))
        ]
    features = [policy.codec.prompt_features(prompt.conditional) for prompt in ids]
    return [original.of_captions(features, tokens, conditional=branch) for branch in (True, False)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("condition", "key"), [("class", "model"), ("class", None), ("text", "module"), ("text", "ema")]
)
def test_logits_and_pictures_are_those_of_the_original_architecture(condition, key, tmp_path):
    original, tokenizer = publish(tmp_path / "source", condition, key=key)
    policy, texts, tokens = policy_at(convert(tmp_path)), TEXTS[condition], some_tokens(len(TEXTS[condition]))
    ids = [policy.codec.encode_prompt(text) for text in texts]
    expected = originals_logits(original, policy, texts, tokens)
    for branch, logits in zip(("conditional", "unconditional"), expected, strict=True):
        found = policy.image_logits([getattr(prompt, branch) for prompt in ids], tokens)
        assert logits.std() > 0.5
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.5
    pictures = tokenizer.decode_code(tokens)
    assert pictures.std() > 0.1
    torch.testing.assert_close(PictureDecoder(policy.model.vq)(tokens, policy.codec.grid), pictures, rtol=0, atol=1e-4)
    greys = torch.clamp(127.5 * pictures + 128.0, 0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert (policy.codec.decode(tokens).int() - greys.int()).abs().max() <= 1
    assert policy.codec.decode(tokens).shape == (len(tokens), PIXELS, PIXELS, 3)


def test_five_levels_make_sixteen_pixels_of_a_token(tmp_path, monkeypatch):
    monkeypatch.setitem(VQ, "channel_multiplier", [1, 1, 1, 2, 2])
    _, tokenizer = publish(tmp_path / "source", "class")
    (tmp_path / "source" / "config.json").write_text(json.dumps({"num_attention_heads": 2, "image_size": 16 * SIDE}))
    policy = policy_at(convert(tmp_path))
    with torch.no_grad():
        pictures = PictureDecoder(policy.model.vq)(some_tokens(1), policy.codec.grid)
        torch.testing.assert_close(pictures, tokenizer.decode_code(some_tokens(1)), rtol=0, atol=1e-4)
    assert policy.codec.grid == (SIDE, SIDE) and policy.codec.config.pixels == 16 * SIDE == pictures.shape[-1]


@pytest.fixture(scope="module", params=CONDITIONS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llamagen")
    publish(directory / "source", request.param)
    return convert(directory)


def texts_of(checkpoint: Path) -> tuple[str, ...]:
    return TEXTS[json.loads((checkpoint / "config.json").read_text())["condition"]]


def test_a_prompt_by_its_embeddings_is_the_prompt_by_its_entries(checkpoint: Path) -> None:
    policy = policy_at(checkpoint)
    assert isinstance(policy.backbone, EmbedsPrompts)
    branches = [policy.codec.encode_prompt(text).conditional for text in texts_of(checkpoint)]
    with torch.no_grad():
        embeds = {row: policy.backbone.embed_prompts([branch]) for row, branch in enumerate(branches)}
        by_entries = policy.decoder(len(branches), max(map(len, branches))).prefill(branches)
        for mine in (embeds, {0: embeds[0]}):
            by_embeds = policy.decoder(len(branches), max(map(len, branches))).prefill(branches, mine)
            torch.testing.assert_close(by_embeds, by_entries)
        for row, own in embeds.items():
            torch.testing.assert_close(policy.backbone.prompt_states(own[None])[0, -1], by_entries[row])


def _rank(number: int, address: str, path: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.init_process_group(number, 2, address, CPU, timeout_s=120)
    run = learner_case.tiny_run(
        path, policy={"path": str(path), "family": "llamagen"}, learner={"autocast": "bfloat16"}
    )
    learner, logits = Learner(run, threads=1, ranks=ranks), list[torch.dtype]()
    learner.policy.model.gpt["head"].register_forward_hook(lambda _, __, made: logits.append(made.dtype))
    learner.update(*drawn(FAMILIES["llamagen, classes"], path))
    assert set(logits) == {torch.float32}
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["class"], indirect=True)
def test_two_ranks_make_logits_in_float32_also_under_autocast(checkpoint: Path) -> None:
    processes.spawn(_rank, (f"127.0.0.1:{free_port()}", checkpoint), nprocs=2)
