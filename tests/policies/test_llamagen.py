"""LlamaGen's published files say after conversion what their own architecture says, in both engines and the learner."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as processes
from safetensors.torch import load_file, save_file

from stage_ray.cli import main
from stage_ray.config import PolicyConfig
from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageEngine
from stage_ray.learner.learner import Learner
from stage_ray.learner.ranks import Ranks
from stage_ray.policies import load_policy
from stage_ray.policies.decoding import EmbedsPrompts
from stage_ray.policies.image_tokenizer import PictureDecoder
from stage_ray.policies.llamagen import LlamaGenPolicy
from stage_ray.policies.llamagen.model import LlamaGenModel
from stage_ray.samplers import SamplingParams
from tests import learner_case
from tests.engines.test_engines import assert_statistics_match, request, rollout, weights_of
from tests.policies.deepseek import CODES, PIXELS, SIDE, VQ
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


@pytest.fixture(scope="module")
def other(checkpoint: Path) -> Path:
    """The same model at other trained weights."""
    policy = policy_at(checkpoint)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    policy.save(checkpoint.with_name("other"))
    return checkpoint.with_name("other")


def texts_of(checkpoint: Path) -> tuple[str, ...]:
    return TEXTS[json.loads((checkpoint / "config.json").read_text())["condition"]]


@pytest.fixture(scope="module", params=["torch", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ImageEngine]:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    engine = build_engine(config(checkpoint), rollout(request.param), worker=f"test-{request.param}")
    assert isinstance(engine, ImageEngine)
    yield engine
    engine.close()


def test_what_is_recorded_is_what_a_full_forward_says_guided_or_not_at_every_version(
    engine: ImageEngine, checkpoint: Path, other: Path
) -> None:
    requests = [request(text, (3, 50 + index), index) for index, text in enumerate(texts_of(checkpoint))]
    for version, path in enumerate([checkpoint, other, checkpoint]):
        policy = policy_at(path)
        if version:
            engine.load_weights(version, weights_of(policy))
        for params in (engine.params, SamplingParams(), SamplingParams(guidance_scale=3.0, temperature=0.8, top_k=20)):
            for group in engine.generate(requests, params):
                assert group.policy_version == version and group.images.shape == (2, PIXELS, PIXELS, 3)
                assert_statistics_match(group, policy, params)


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


def test_both_engines_draw_the_same_images(engine: ImageEngine, checkpoint: Path) -> None:
    """But for a draw between two candidates that rounding tips, after which all else of an image differs."""
    requests = [request(text, (1, 2, 3), index) for index, text in enumerate(texts_of(checkpoint))]
    plain = build_engine(config(checkpoint), rollout("torch"), worker="plain")
    pairs = zip(engine.generate(requests), plain.generate(requests), strict=True)
    same = [one.tolist() == other.tolist() for a, b in pairs for one, other in zip(a.tokens, b.tokens, strict=True)]
    assert len(same) == 12 and sum(same) >= 11
    plain.close()


def test_a_seed_gives_one_image_whatever_the_company_and_its_captions_lengths(
    engine: ImageEngine, checkpoint: Path
) -> None:
    texts = texts_of(checkpoint)
    alone = engine.generate([request(texts[1], (42,))])[0].tokens[0]
    mixed = engine.generate([request(texts[2], (9, 8)), request(texts[1], (7, 42, 1), group_id=1)])[1].tokens[1]
    assert alone.tolist() == mixed.tolist()


SEVERAL = {"pipeline": {"max_staleness": 5}, "learner": {"lr": 1e-3, "autocast": "off", "micro_batch_images": 4}}


def learner_at(path: Path, ranks: Ranks | None = None, **sections: Any) -> Learner:
    run = learner_case.tiny_run(path, policy={"path": str(path), "family": "llamagen"}, **sections)
    return Learner(run, threads=1, ranks=ranks or Ranks())


def updates(learner: Learner, count: int, guidance: float = 1.0) -> list[dict[str, float]]:
    """On groups that the checkpoint drew, so that every rank has the same."""
    path = Path(learner._run.policy.path)
    groups = learner_case.sample_groups(policy_at(path), texts_of(path), 4)
    return [learner.update(groups, learner_case.score(groups)) for _ in range(count)]


def test_a_learner_trains_all_but_what_is_frozen_and_what_it_saves_and_exports_loads(
    checkpoint: Path, tmp_path: Path
) -> None:
    learner = learner_at(checkpoint, **SEVERAL)
    first = updates(learner, 1)[0]
    assert first["kl"] == 0 and first["mismatch/abs_logprob"] < 1e-5
    learner.save_state(tmp_path / "state")
    learner.export(tmp_path / "export")
    exported, before = (LlamaGenModel.from_pretrained(path).state_dict() for path in (tmp_path / "export", checkpoint))
    trained = dict(learner.weights())
    for name, tensor in exported.items():
        assert torch.equal(tensor, trained.get(name, before[name]))
        assert torch.equal(tensor, before[name]) == (name.startswith("vq.") or name == "unconditional"), name
    again = learner_at(checkpoint, **SEVERAL)
    again.load_state(tmp_path / "state")
    assert again.version == 1 and updates(again, 1)[0]["loss"] == updates(learner, 1)[0]["loss"]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(again.weights(), learner.weights(), strict=True))


def test_recomputed_activations_give_the_same_update_also_under_guided_gradients(checkpoint: Path) -> None:
    found = []
    for checkpointing in (False, True):
        options = {"autocast": "off", "lr": 1e-3, "micro_batch_images": 4, "gradient_checkpointing": checkpointing}
        learner = learner_at(checkpoint, recipe="ar_grpo", learner=options, rollout={"guidance_scale": 2.0})
        updates(learner, 1)
        found.append(dict(learner.weights()))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6)


def _rank(number: int, address: str, path: Path, out: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.init_process_group(number, 2, address, CPU, timeout_s=120)
    learner = learner_at(path, ranks, **SEVERAL)
    assert {type(parameter).__name__ for parameter in learner.policy.trained_parameters().values()} == {"DTensor"}
    updates(learner, 2)
    found = {name: tensor.clone() for name, tensor in learner.weights()}
    if number == 0:
        save_file(found, out / "two.safetensors")
    narrow = learner_at(path, ranks, **SEVERAL | {"learner": SEVERAL["learner"] | {"autocast": "bfloat16"}})
    logits: list[torch.dtype] = []
    narrow.policy.model.gpt["head"].register_forward_hook(lambda _, __, made: logits.append(made.dtype))
    updates(narrow, 1)
    assert set(logits) == {torch.float32}
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(checkpoint: Path, tmp_path: Path) -> None:
    processes.spawn(_rank, (f"127.0.0.1:{free_port()}", checkpoint, tmp_path), nprocs=2)
    alone = learner_at(checkpoint, **SEVERAL)
    updates(alone, 2)
    two = load_file(tmp_path / "two.safetensors")
    for name, tensor in alone.weights():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=2e-5)
