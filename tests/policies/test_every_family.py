"""What every family keeps: its engines record what the learner computes, and what is trained is saved and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as processes
from safetensors.torch import load_file, save_file

from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageEngine
from stage_ray.errors import ConfigError
from stage_ray.learner.learner import Learner
from stage_ray.learner.ranks import Ranks
from stage_ray.pretrained import read_tensors
from stage_ray.samplers import SamplingParams
from tests import learner_case
from tests.engines.test_engines import assert_statistics_match, request, rollout, weights_of
from tests.policies.families import BUT_JANUS, FAMILIES, Family, drawn, moved
from tests.ray_head import free_port

CPU = torch.device("cpu")
OPTIONS = {"autocast": "off", "lr": 1e-3, "micro_batch_images": 4}
SEVERAL = {"pipeline": {"max_staleness": 5}, "learner": OPTIONS}  # updates on the same groups
BOTH_BRANCHES = {"recipe": "ar_grpo", "rollout": {"guidance_scale": 2.0}, **SEVERAL}


@pytest.fixture(scope="module", params=BUT_JANUS)
def row(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(row: str) -> Family:
    return FAMILIES[row]


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.write(tmp_path_factory.mktemp("family") / "model")


@pytest.fixture(scope="module", params=["torch", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, family: Family, checkpoint: Path) -> Iterator[ImageEngine]:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    engine = build_engine(family.config(checkpoint), rollout(request.param), worker=f"test-{request.param}")
    assert isinstance(engine, ImageEngine)
    yield engine
    engine.close()


def test_what_is_recorded_is_what_a_full_forward_says_guided_or_not_at_every_version(
    engine: ImageEngine, family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    other = moved(checkpoint, tmp_path / "other", family)
    requests = [request(text, (3, 50 + index), index) for index, text in enumerate(family.texts)]
    for version, path in enumerate([checkpoint, other, checkpoint]):
        policy = family.policy(path)
        if version:
            engine.load_weights(version, weights_of(policy))
        for params in (engine.params, SamplingParams(), SamplingParams(guidance_scale=3.0, temperature=0.8, top_k=20)):
            for group in engine.generate(requests, params):
                assert group.policy_version == version and group.tokens.shape == (2, policy.image_tokens)
                assert group.images.shape == policy.codec.decode(torch.from_numpy(group.tokens).long()).shape
                assert group.images.std() > 1
                assert_statistics_match(group, policy, params)


def test_both_engines_draw_the_same_images(engine: ImageEngine, family: Family, checkpoint: Path) -> None:
    """But for a draw between two candidates that rounding tips, after which all else of an image differs."""
    requests = [request(text, (1, 2, 3), index) for index, text in enumerate(family.texts)]
    plain = build_engine(family.config(checkpoint), rollout("torch"), worker="plain")
    pairs = zip(engine.generate(requests), plain.generate(requests), strict=True)
    same = [one.tolist() == other.tolist() for a, b in pairs for one, other in zip(a.tokens, b.tokens, strict=True)]
    assert len(same) == 3 * len(family.texts) and sum(same) >= len(same) - 1
    plain.close()


def test_a_seed_gives_one_image_whatever_the_company_and_its_prompts_lengths(
    engine: ImageEngine, family: Family
) -> None:
    alone = engine.generate([request(family.texts[1], (42,))])[0].tokens[0]
    company = [request(family.texts[2], (9, 8)), request(family.texts[1], (7, 42, 1), group_id=1)]
    assert alone.tolist() == engine.generate(company)[1].tokens[1].tolist()


def learner_at(family: Family, path: Path, ranks: Ranks | None = None, **sections: Any) -> Learner:
    run = learner_case.tiny_run(path, policy={"path": str(path), "family": family.name}, **sections)
    return Learner(run, threads=1, ranks=ranks or Ranks())


def test_a_learner_trains_what_is_trained_and_what_it_saves_and_exports_loads(
    family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    learner, groups = learner_at(family, checkpoint, **SEVERAL), drawn(family, checkpoint)
    first = learner.update(*groups)
    assert first["kl"] == 0 and first["mismatch/abs_logprob"] < 1e-5
    learner.save_state(tmp_path / "state")
    learner.export(tmp_path / "export")
    exported, before = (read_tensors(path, ("",)) for path in (tmp_path / "export", checkpoint))
    trained = dict(learner.weights())
    assert exported.keys() == before.keys() > trained.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, trained.get(name, before[name]))
        assert torch.equal(tensor, before[name]) != family.is_trained(name), name
    again = learner_at(family, checkpoint, **SEVERAL)
    again.load_state(tmp_path / "state")
    assert again.version == 1 and again.update(*groups)["loss"] == learner.update(*groups)["loss"]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(again.weights(), learner.weights(), strict=True))


def test_recomputed_activations_give_the_same_update_through_both_branches_of_guidance(
    family: Family, checkpoint: Path
) -> None:
    recomputing = BOTH_BRANCHES | {"learner": OPTIONS | {"gradient_checkpointing": True}}
    if not family.recomputes:
        with pytest.raises(ConfigError, match="learner.gradient_checkpointing is true, which this policy.family"):
            learner_at(family, checkpoint, **recomputing)
        return
    learners = [learner_at(family, checkpoint, **sections) for sections in (BOTH_BRANCHES, recomputing)]
    for learner in learners:
        learner.update(*drawn(family, checkpoint))
    for (_, kept), (_, recomputed) in zip(*(learner.weights() for learner in learners), strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-4, atol=1e-6)


def _rank(number: int, address: str, row: str, path: Path, out: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.init_process_group(number, 2, address, CPU, timeout_s=120)
    learner, groups = learner_at(FAMILIES[row], path, ranks, **BOTH_BRANCHES), drawn(FAMILIES[row], path)
    assert {type(parameter).__name__ for parameter in learner.policy.trained_parameters().values()} == {"DTensor"}
    for _ in range(2):
        learner.update(*groups)
    found = {name: tensor.clone() for name, tensor in learner.weights()}
    if number == 0:
        save_file(found, out / "two.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(row: str, family: Family, checkpoint: Path, tmp_path: Path) -> None:
    processes.spawn(_rank, (f"127.0.0.1:{free_port()}", row, checkpoint, tmp_path), nprocs=2)
    alone, groups = learner_at(family, checkpoint, **BOTH_BRANCHES), drawn(family, checkpoint)
    for _ in range(2):
        alone.update(*groups)
    two = load_file(tmp_path / "two.safetensors")
    for name, tensor in alone.weights():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=2e-5)
