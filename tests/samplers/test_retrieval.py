"""Retrieval: a mixture as published, an index that finds itself and is of one tokenizer, and records that are kept."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stage_ray.cli import main
from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.engines import build_engine
from stage_ray.errors import ConfigError
from stage_ray.policies import load_policy
from stage_ray.records import Prompt, RolloutRequest
from stage_ray.run.preflight import preflight
from stage_ray.samplers import Context, SamplingParams, patch_index, process_logits
from stage_ray.samplers.patch_index import PatchIndex, load_index
from stage_ray.samplers.retrieval import RetrievalRule
from tests.plain import FAMILY, IMAGE_TOKENS, PlainCodec, PlainPolicy, plain_checkpoint
from tests.runs import tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")

CODES, ROWS, COLUMNS, PICTURES = 6, 3, 5, 4


@pytest.fixture(scope="module")
def small() -> PatchIndex:
    """Pictures of 3 x 5 tokens of 6 codes, whose vectors have two dimensions."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(CODES, (PICTURES, ROWS, COLUMNS), generator=generator, dtype=torch.int32)
    return PatchIndex(tokens, torch.randn(CODES, 2, generator=generator))


@pytest.fixture(scope="module")
def saved(small: PatchIndex, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("index") / "small.safetensors"
    small.save(file)
    return str(file)


def literally(
    index: PatchIndex, sequence: list[int], position: int, logits: list[float], **options: float
) -> list[float]:
    """The published code's arithmetic for one token: p, of which the rule gives the logarithm."""
    model = [math.exp(logit - max(logits)) for logit in logits]
    p = [one / sum(model) for one in model]
    if not (position > COLUMNS and (position - 1) % COLUMNS < COLUMNS - 2):
        return p
    around = [sequence[position - back] for back in (COLUMNS + 1, COLUMNS, COLUMNS - 1, 1)]
    query = [x for token in around for x in index.codebook[token].tolist()]
    patches = []
    for picture in index.tokens.tolist():
        for row in range(1, ROWS):
            for column in range(1, COLUMNS - 1):
                before = [*picture[row - 1][column - 1 : column + 2], picture[row][column - 1]]
                vector = [x for token in before for x in index.codebook[token].tolist()]
                distance = sum((a - b) ** 2 for a, b in zip(query, vector, strict=True))
                patches.append((distance, picture[row][column]))
    nearest: dict[int, float] = {}
    for distance, code in sorted(patches)[: int(options["k"])]:
        nearest.setdefault(code, distance)  # unique: the nearest patch with a code stands for it
    weights = {code: math.exp(-distance / options["tau"]) for code, distance in nearest.items()}
    retrieved = [weights.get(code, 0.0) / sum(weights.values()) for code in range(CODES)]
    return [(1 - options["lam"]) * own + options["lam"] * other for own, other in zip(p, retrieved, strict=True)]


def everywhere(options: dict[str, float], saved: str, logits: Tensor, sequence: Tensor, **params: float) -> Tensor:
    """Logits at all positions of one image at once, as the learner makes them."""
    rule = RetrievalRule.model_validate({"index": saved, **options})
    positions = torch.arange(len(sequence))
    context = Context(positions, sequence.expand(len(sequence), -1))
    return process_logits(logits, None, SamplingParams(rule=rule, **params), context)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"lam": 0.3, "tau": 0.7, "k": 5}, {"lam": 0.9, "tau": 4.0, "k": 2048}])
def test_the_mixture_is_that_of_a_literal_loop(small: PatchIndex, saved: str, options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        logits = torch.randn(ROWS * COLUMNS, CODES, generator=generator)
        sequence = torch.randint(CODES, (ROWS * COLUMNS,), generator=generator)
        found = everywhere(options, saved, logits, sequence).softmax(dim=-1)
        for position in range(ROWS * COLUMNS):
            expected = literally(small, sequence.tolist(), position, logits[position].tolist(), **options)
            assert found[position].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6), position


def test_each_row_stands_by_itself_and_reads_no_token_that_is_not_drawn_yet(saved: str) -> None:
    generator = torch.Generator().manual_seed(6)
    logits, sequence = torch.randn(15, CODES, generator=generator), torch.randint(CODES, (15,), generator=generator)
    whole = everywhere({"lam": 0.5}, saved, logits, sequence)
    rule = RetrievalRule(index=saved, lam=0.5)
    for position in range(15):
        drawn = sequence.clone()
        drawn[position:] = 0
        context = Context(torch.tensor([position]), drawn[None])
        alone = process_logits(logits[position : position + 1], None, SamplingParams(rule=rule), context)
        torch.testing.assert_close(alone[0], whole[position], rtol=1e-5, atol=1e-6)
    assert torch.equal(process_logits(logits, None, SamplingParams(rule=rule)), logits), (
        "first tokens have no neighbours"
    )


def test_top_k_cuts_the_model_alone_and_the_gradient_is_that_of_finite_differences(saved: str) -> None:
    generator = torch.Generator().manual_seed(7)
    sequence = torch.randint(CODES, (15,), generator=generator)
    logits = torch.randn(15, CODES, generator=generator, dtype=torch.float64).float()
    found = everywhere({"lam": 0.4, "k": 1}, saved, logits, sequence, top_k=2)
    counts = found.isfinite().sum(dim=-1)
    assert counts[:6].tolist() == [2] * 6 and 2 <= int(counts.min()) <= int(counts.max()) <= 4
    chosen = torch.arange(15), found.argmax(dim=-1)

    def total(values: Tensor) -> Tensor:
        return everywhere({"lam": 0.4, "k": 1}, saved, values, sequence, top_k=2).log_softmax(dim=-1)[chosen].sum()

    leaf = logits.clone().requires_grad_(True)
    total(leaf).backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    for row, column in ((1, int(logits[1].argmax())), (7, int(logits[7].argmax()))):
        step = torch.zeros_like(logits)
        step[row, column] = 1e-2
        slope = (total(logits + step) - total(logits - step)) / 2e-2
        assert float(leaf.grad[row, column]) == pytest.approx(float(slope), abs=2e-3)


def test_an_index_finds_itself(small: PatchIndex) -> None:
    far = small.nearest(small.contexts, k=1, probes=1)
    own = far.gather(1, small.codes.unsqueeze(1)).squeeze(1)
    assert small.contexts.shape == (PICTURES * 2 * 3, 4) and float(own.max()) == 0.0
    assert bool((far.isfinite().sum(dim=-1) >= 1).all())


def test_inverted_lists_find_what_lies_beside_them_and_are_of_one_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(patch_index, "BITS", 4)  # an index of a few patches, trained in a moment
    monkeypatch.setattr(patch_index, "FEWEST", 39 * 16)
    monkeypatch.setattr(patch_index, "ROTATIONS", 1)
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(64, (30, 8, 8), generator=generator, dtype=torch.int32)
    exact = PatchIndex(tokens, torch.randn(64, 4, generator=generator))
    exact.with_lists().save(tmp_path / "lists.safetensors")
    found = load_index(str(tmp_path / "lists.safetensors"), "key")
    queries = exact.contexts[:40]
    far, best = found.nearest(queries, k=200, probes=64), exact.nearest(queries, k=200, probes=0)
    assert float(far.gather(1, exact.codes[:40, None]).max()) == 0.0
    both = far.isfinite() & best.isfinite()
    beyond = far[both] - best[both]  # what is found has its exact distance, and may not be the nearest with its token
    assert float(beyond.min()) > -1e-5 and float((beyond < 1e-5).float().mean()) > 0.8
    assert both.sum() > 0.5 * best.isfinite().sum()
    assert torch.equal(torch.cat([found.nearest(one[None], k=200, probes=64) for one in queries]), far)
    with pytest.raises(ConfigError, match="needs 624 patches to train on, and here are 126; use --kind exact"):
        PatchIndex(tokens[:3], exact.codebook).with_lists()
    (tmp_path / "lists.faiss").write_bytes(b"another")
    with pytest.raises(ConfigError, match="lists.faiss is not the file that was made with it"):
        load_index(str(tmp_path / "lists.safetensors"), "key")


def test_without_faiss_the_extra_is_named_and_an_exact_index_needs_none(
    plain: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "stage_ray.registry.importlib.util.find_spec", lambda name: None if name == "faiss" else find(name)
    )
    words = ["index", str(plain), str(pictures), "--family", FAMILY, "--out"]
    assert main([*words, str(tmp_path / "lists.safetensors"), "--kind", "ivfpq"]) == 2
    assert "faiss is not installed here; pip install 'stage-ray[retrieval]'" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "exact.safetensors"), "--kind", "exact"]) == 0


@pytest.fixture(scope="module")
def pictures(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of random tokens, one of them twice as large and wider, one below a folder; and a broken file."""
    directory = tmp_path_factory.mktemp("pictures")
    codec = PlainPolicy.load_codec(PolicyConfig(path=str(plain), family=FAMILY), device=torch.device("cpu"))
    (directory / "below").mkdir()
    for number, image in enumerate(codec.decode(tokens_of_pictures())):
        picture = Image.fromarray(image.numpy())
        if number == 3:  # its middle is the picture
            wide = Image.new("RGB", (48, 32))
            wide.paste(picture, (8, 0))
            picture = wide.resize((96, 64), Image.Resampling.NEAREST)
        picture.save(directory / ("below" if number == 4 else ".") / f"{'z' if number == 4 else ''}{number}.png")
    (directory / "2b.png").write_bytes(b"no picture")
    (directory / "notes.txt").write_text("no picture either")
    return directory


def tokens_of_pictures() -> Tensor:
    return torch.randint(48, (5, IMAGE_TOKENS), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def index(plain: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of them."""
    file = tmp_path_factory.mktemp("index") / "patches.safetensors"
    assert main(["index", str(plain), str(pictures), "--family", FAMILY, "--out", str(file)]) == 0
    return file


def test_the_command_encodes_what_it_can_read_and_says_what_it_left_out(
    plain: Path, pictures: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = tokens_of_pictures().view(5, 4, 4)
    assert torch.equal(load_index(str(index), "key").tokens, expected.int())
    again = tmp_path / "again.safetensors"
    assert main(["index", str(plain), str(pictures), "--family", FAMILY, "--out", str(again)]) == 0
    said = capsys.readouterr().out
    assert "left out: 2b.png: " in said and "30 patches of 5 pictures, 1 left out" in said
    assert torch.equal(load_index(str(again), "key").tokens, expected.int()) and not list(tmp_path.glob("*.parts"))


def test_a_command_that_was_stopped_goes_on_after_what_is_done(
    plain: Path, pictures: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage_ray.inference.picture_index.PART", 2)
    out, encode, calls = tmp_path / "parts.safetensors", PlainCodec.encode, list[int]()

    def failing(stop_at: int) -> Callable[[PlainCodec, Tensor], Tensor]:
        def replaced(self: PlainCodec, images: Tensor) -> Tensor:
            calls.append(len(images))
            if len(calls) == stop_at:
                raise RuntimeError("the power is gone")
            return encode(self, images)

        return replaced

    words = ["index", str(plain), str(pictures), "--family", FAMILY, "--out", str(out)]
    monkeypatch.setattr(PlainCodec, "encode", failing(2))
    with pytest.raises(RuntimeError, match="the power is gone"):
        main(words)
    assert not out.exists()
    monkeypatch.setattr(PlainCodec, "encode", failing(0))
    assert main(words) == 0 and calls == [2, 1, 1, 2], "the first two pictures are not encoded again"
    assert torch.equal(load_index(str(out), "key").tokens, load_index(str(index), "key").tokens)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("exists", "exists; name another file, or remove it"),
        ("empty", "holds no pictures (.jpeg, .jpg, .png, .webp)"),
        ("unreadable", "none of 1 pictures of"),
        ("parts", "holds a part of other pictures or another model; remove it"),
    ],
)
def test_what_cannot_become_an_index_is_named(
    plain: Path, pictures: Path, tmp_path: Path, change: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, out = tmp_path / "pictures", tmp_path / "out.safetensors"
    directory.mkdir()
    if change == "exists":
        out.touch()
    if change in ("unreadable", "parts"):
        (directory / "a.png").write_bytes((pictures / "2b.png").read_bytes())
    words = ["index", str(plain), str(directory), "--family", FAMILY, "--out", str(out)]
    if change == "parts":
        main(words)  # which leaves what it knows of the broken one
        (directory / "a.png").write_bytes((pictures / "0.png").read_bytes())
    assert main(words) == (1 if change == "unreadable" else 2)
    assert sentence in capsys.readouterr().err


def rollout(index: object, **options: object) -> dict[str, object]:
    found = {"index": str(index), "lam": 0.6, "tau": 0.2, "k": 8, **options}
    return {"engine": "torch", "dtype": "float32", "gpus": 0, "guidance_scale": 3.0, "sampler": "retrieval"} | {
        "sampler_options": found
    }


def test_the_engine_records_what_a_teacher_forced_forward_gives(plain: Path, index: Path) -> None:
    policy, config = PolicyConfig(path=str(plain), family=FAMILY), RolloutConfig.model_validate(rollout(index))
    engine = build_engine(policy, config, worker="test")
    (group,) = engine.generate([RolloutRequest(0, Prompt(0, "a red ring"), (1, 2, 3))])
    (alone,) = engine.generate([RolloutRequest(0, Prompt(0, "a red ring"), (2,))])
    engine.close()
    assert (alone.tokens[0] == group.tokens[1]).all(), "a seed's image depends on nothing else"
    model, tokens = load_policy(policy, device=torch.device("cpu")), torch.from_numpy(group.tokens).long()
    prompts = [model.codec.encode_prompt("a red ring")] * 3
    found = model.guided_token_logprobs(prompts, tokens, SamplingParams.of(config), guided_grad=True)
    assert found.guided_logprobs is not None
    np.testing.assert_allclose(found.guided_logprobs.detach().numpy(), group.guided_logprobs, atol=1e-4)
    found.guided_logprobs.sum().backward()
    gradients = [one.grad for one in model.trained_parameters().values() if one.grad is not None]
    assert gradients and all(bool(one.isfinite().all()) for one in gradients)
    guided = SamplingParams.of(config.model_copy(update={"sampler": "guided", "sampler_options": {}}))
    without = model.guided_token_logprobs(prompts, tokens, guided).guided_logprobs
    assert without is not None
    changed = (without - found.guided_logprobs).abs().detach().amax(dim=0).view(4, 4) > 1e-3
    assert bool(changed[1:, 1:3].any()) and not bool(changed[0].any()) and not bool(changed[:, [0, 3]].any())


def test_an_index_of_another_tokenizer_is_refused_by_what_differs(
    plain: Path, index: Path, saved: str, tmp_path: Path
) -> None:
    def build(path: Path, **options: object) -> None:
        build_engine(
            PolicyConfig(path=str(path), family=FAMILY), RolloutConfig.model_validate(rollout(**options)), worker="test"
        ).close()

    build(plain, index=index)
    for options, sentence in (
        ({"index": saved}, "is of tokens of 3 x 5, 6 codes, and the model of tokens of 4 x 4, 48 codes; make one with"),
        ({"index": tmp_path / "nothing"}, "nothing does not exist; make it with stage-ray index MODEL PICTURES"),
        ({"index": plain / "model.safetensors"}, "is no stage_ray patch index 1"),
        ({"index": __file__}, "rollout.sampler_options.index = "),
    ):
        with pytest.raises(ConfigError, match="rollout.sampler_options.index") as error:
            build(plain, **options)
        assert sentence in str(error.value)
    other = plain_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="is of an image tokenizer with another codebook"):
        build(other, index=index)
    with pytest.raises(ConfigError, match="is of tokens of 3 x 5, 6 codes"):
        preflight(tiny_run(tmp_path, plain, rollout=rollout(saved)))
    with pytest.raises(ConfigError, match="rollout.sampler_options.index is missing: sampler retrieval needs it"):
        SamplingParams.of(RolloutConfig(sampler="retrieval"))
