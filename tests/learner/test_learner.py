from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import JanusForConditionalGeneration

from stage_ray.config import LearnerConfig
from stage_ray.learner.batch import LearnerError
from stage_ray.learner.learner import Learner
from stage_ray.learner.schedule import learning_rate
from stage_ray.policies.devices import hardware_has_bfloat16
from stage_ray.records import RolloutGroup, ScoredGroup
from stage_ray.samplers import SamplingParams
from stage_ray.weights.manifest import pack, unpack
from tests.learner_case import PROMPTS, sample_groups, score, tiny_run, train
from tests.tiny import tiny_janus

Scored = tuple[list[RolloutGroup], list[ScoredGroup]]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scored(model: Path) -> Scored:
    """Three groups of four images at version 0, prompts of three lengths."""
    groups = sample_groups(Learner(tiny_run(model)).policy, PROMPTS, 4)
    return groups, score(groups)


def snapshot(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.weights()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def shard(directory: Path) -> Path:
    """The file of a learner of one rank that holds weights and optimizer moments."""
    (path,) = (directory / "shards").iterdir()
    return path


def with_group(scored: Scored, **changes: Any) -> Scored:
    """The same groups, one field of the second changed."""
    groups, scores = scored
    return [groups[0], dataclasses.replace(groups[1], **changes), *groups[2:]], scores


def with_scores(scored: Scored, **changes: Any) -> Scored:
    groups, scores = scored
    return groups, [scores[0], dataclasses.replace(scores[1], **changes), *scores[2:]]


def test_a_few_updates_raise_a_synthetic_reward(model: Path) -> None:
    learner = Learner(
        tiny_run(model, steps=8, learner={"lr": 2e-3, "micro_batch_images": 16}, algorithm={"beta": 0.01})
    )
    history = train(learner, 6, group_size=8)
    assert learner.version == 6
    assert history[-1]["reward/mean"] > history[0]["reward/mean"] + 0.25
    assert history[-1]["kl"] > 0 == history[0]["kl"]


def test_the_first_update_starts_at_the_reference_and_agrees_with_the_sampler(model: Path, scored: Scored) -> None:
    metrics = Learner(tiny_run(model)).update(*scored)
    assert metrics["kl"] == 0.0
    assert metrics["entropy/policy"] == pytest.approx(metrics["entropy/reference"], abs=1e-5)
    assert metrics["entropy_reward/mean"] == pytest.approx(1.0)
    assert metrics["mismatch/abs_logprob"] < 1e-5
    assert metrics["mismatch/max_abs_logprob"] < 1e-4
    assert metrics["ratio/max"] == 1.0
    assert metrics["staleness/max"] == 0.0
    assert metrics["grad_norm"] > 0
    assert (metrics["images"], metrics["tokens"]) == (12, 12 * 16)


def test_rewards_are_reported_as_the_scorers_gave_them(model: Path, scored: Scored) -> None:
    run = tiny_run(model, rewards=[{"type": "geneval", "weight": 3.0}])
    metrics = Learner(run).update(*scored)
    all_scores = np.stack([item.scores[:, 0] for item in scored[1]])
    assert metrics["reward/geneval"] == pytest.approx(all_scores.mean(), abs=1e-6)
    assert metrics["reward/mean"] == pytest.approx(3 * all_scores.mean(), abs=1e-6)
    assert metrics["reward/std"] == pytest.approx(3 * all_scores.std(axis=1, ddof=1).mean(), abs=1e-6)


def test_a_group_without_variance_is_counted(model: Path, scored: Scored) -> None:
    constant = with_scores(scored, scores=np.full((4, 1), 0.5, np.float32))
    metrics = Learner(tiny_run(model, algorithm={"entropy_reward": 0.0})).update(*constant)
    assert metrics["advantage/zero_groups"] == pytest.approx(1 / 3)
    assert metrics["reward/informative"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("images", [1, 5])
def test_the_size_of_micro_batches_changes_nothing_but_rounding(model: Path, scored: Scored, images: int) -> None:
    whole, cut = Learner(tiny_run(model)), Learner(tiny_run(model, learner={"micro_batch_images": images}))
    expected, got = timeless(whole.update(*scored)), timeless(cut.update(*scored))
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    after, start = snapshot(whole), snapshot(Learner(tiny_run(model)))
    for name, tensor in snapshot(cut).items():
        # Adam's first step moves every weight by about lr, whatever its gradient: near-zero gradients may flip sign
        agree = ((tensor - after[name]).abs() < 1e-5).float().mean()
        assert agree > 0.99, name
        assert not torch.equal(tensor, start[name])


@pytest.mark.parametrize("autocast", ["off", "bfloat16"])
def test_recomputing_activations_changes_nothing(model: Path, scored: Scored, autocast: str) -> None:
    plain = Learner(tiny_run(model, learner={"autocast": autocast}))
    saving = Learner(tiny_run(model, learner={"autocast": autocast, "gradient_checkpointing": True}))
    assert timeless(plain.update(*scored)) == timeless(saving.update(*scored))
    assert same(snapshot(plain), snapshot(saving))


def test_the_same_groups_make_the_same_bits(model: Path, scored: Scored) -> None:
    one, two = Learner(tiny_run(model)), Learner(tiny_run(model))
    assert timeless(one.update(*scored)) == timeless(two.update(*scored))
    assert same(snapshot(one), snapshot(two))


def test_only_the_language_model_is_trained(model: Path, scored: Scored) -> None:
    learner = Learner(tiny_run(model))
    before = {name: tensor.clone() for name, tensor in learner.policy.model.state_dict().items()}
    learner.update(*scored)
    moved = {
        name for name, tensor in learner.policy.model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved - {"lm_head.weight"} == {name for name, _ in learner.weights()}  # lm_head is tied to the embedding


def test_a_resumed_learner_goes_on_bit_for_bit(model: Path, tmp_path: Path) -> None:
    run = tiny_run(model, steps=4)
    straight = Learner(run)
    history = train(straight, 4)
    first = Learner(run)
    train(first, 2)
    first.save_state(tmp_path / "state")
    resumed = Learner(run)
    torch.manual_seed(999)  # a resumed run must not depend on what happened in this process
    resumed.load_state(tmp_path / "state")
    assert resumed.version == 2
    rest = train(resumed, 2)
    assert [timeless(m) for m in rest] == [timeless(m) for m in history[2:]]
    assert same(snapshot(resumed), snapshot(straight))


def test_the_random_state_is_part_of_the_state(model: Path, tmp_path: Path) -> None:
    learner = Learner(tiny_run(model))
    torch.rand(3)
    learner.save_state(tmp_path)
    expected = torch.rand(4)
    learner.load_state(tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_a_fresh_learner_can_be_saved_and_loaded(model: Path, scored: Scored, tmp_path: Path) -> None:
    one, two = Learner(tiny_run(model)), Learner(tiny_run(model))
    one.save_state(tmp_path)
    two.load_state(tmp_path)
    assert timeless(one.update(*scored)) == timeless(two.update(*scored))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: shard(d).unlink(), r"shards/shard-.*\.safetensors cannot be read: it is missing"),
        (lambda d: shard(d).write_bytes(b"short"), r"\.safetensors cannot be read: it has 5 bytes, not \d+"),
        (lambda d: shard(d).write_bytes(bytes(shard(d).stat().st_size)), "shards cannot be read"),
        (lambda d: (d / "random.safetensors").unlink(), "random.safetensors cannot be read"),
        (lambda d: (d / "learner.json").write_text("{"), "learner.json cannot be read"),
        (lambda d: (d / "learner.json").write_text('{"format": 99}'), "has format 99"),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_changes(
    model: Path, scored: Scored, tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    Learner(tiny_run(model)).save_state(tmp_path)
    spoil(tmp_path)
    learner = Learner(tiny_run(model))
    learner.update(*scored)
    before = snapshot(learner)
    with pytest.raises(LearnerError, match=message):
        learner.load_state(tmp_path)
    assert same(before, snapshot(learner))
    assert learner.version == 1


def test_the_state_of_another_base_model_is_refused(model: Path, tmp_path: Path) -> None:
    Learner(tiny_run(model)).save_state(tmp_path / "state")
    other = Learner(tiny_run(tiny_janus(tmp_path / "other", seed=1)))
    with pytest.raises(LearnerError, match="another reference"):
        other.load_state(tmp_path / "state")


def test_published_weights_are_the_trained_ones(model: Path, scored: Scored) -> None:
    learner = Learner(tiny_run(model))
    learner.update(*scored)
    state = learner.policy.model.state_dict()
    manifest, chunks = pack(learner.version, learner.weights())
    for name, tensor in unpack(manifest, list(chunks)):
        assert not tensor.requires_grad
        assert torch.equal(tensor, state[name])


def test_an_export_is_a_checkpoint_that_plain_transformers_loads(model: Path, scored: Scored, tmp_path: Path) -> None:
    learner = Learner(tiny_run(model))
    learner.update(*scored)
    learner.export(tmp_path)
    loaded = JanusForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in learner.weights())
    assert load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: ([], []), "but got 0 and 0"),
        (lambda s: (s[0], s[1][:-1]), "but got 3 and 2"),
        (lambda s: (s[0], s[1][::-1]), "group 0 came with the scores of group 2"),
        (lambda s: with_scores(s, valid=np.array([[True], [False], [True], [True]])), "group 1 has 1 invalid scores"),
        (lambda s: with_scores(s, scores=np.full((4, 1), np.nan, np.float32)), "group 1 has 4 invalid scores"),
        (lambda s: with_scores(s, names=("clip",)), r"scored by \['clip'\], but rewards\[\] names \['geneval'\]"),
        (lambda s: with_scores(s, scores=np.zeros((3, 1), np.float32)), r"4 images, but scores of shape \[3, 1\]"),
        (lambda s: with_group(s, tokens=s[0][1].tokens + 48), r"group 1 has a token outside 0\.\.47"),
        (lambda s: with_group(s, tokens=s[0][1].tokens[:, :8]), r"tokens of shape \[4, 8\], expected \[4, 16\]"),
        (lambda s: with_group(s, logprobs=s[0][1].logprobs * np.inf), "recorded logprobs must be finite"),
        (lambda s: with_group(s, entropy=s[0][1].entropy[:2]), "recorded entropy must be finite, of shape"),
        (lambda s: with_group(s, policy_version=1), "sampled at version 1, the learner is at 0"),
        (lambda s: with_group(s, policy_version=-1), "max_staleness allows a lag of 0 to 0"),
    ],
)
def test_groups_that_must_not_be_trained_on_are_refused(
    model: Path, scored: Scored, change: Callable[[Scored], Scored], message: str
) -> None:
    learner = Learner(tiny_run(model))
    before = snapshot(learner)
    with pytest.raises(LearnerError, match=message):
        learner.update(*change(scored))
    assert same(before, snapshot(learner))
    assert learner.version == 0


def test_a_gradient_that_is_not_finite_leaves_every_weight_alone(model: Path, scored: Scored) -> None:
    run = tiny_run(model, learner={"max_mismatch": None})  # the groups are of version 0 whatever they say
    learner, healthy = Learner(run), Learner(run)
    learner.update(*scored)
    healthy.update(*scored)
    later = [dataclasses.replace(group, policy_version=1) for group in scored[0]], scored[1]
    weight = next(iter(learner.policy.trained_parameters().values()))
    handle = weight.register_hook(lambda gradient: gradient * torch.inf)
    before = snapshot(learner)
    with pytest.raises(LearnerError, match=r"update 1: the gradient norm is (nan|inf); no weight was changed"):
        learner.update(*later)
    assert same(before, snapshot(learner))
    assert learner.version == 1
    handle.remove()
    assert timeless(learner.update(*later)) == timeless(healthy.update(*later))  # nor is anything left in the optimiser


def test_a_loss_that_is_not_finite_leaves_every_weight_alone(model: Path, scored: Scored) -> None:
    learner = Learner(tiny_run(model, algorithm={"beta": 1e38, "entropy_reward": 0.0}))
    with torch.no_grad():
        for parameter in learner.policy.trained_parameters().values():
            parameter.mul_(3.0)  # far from the reference
    before = snapshot(learner)
    with pytest.raises(LearnerError, match="the loss is (nan|inf)"):
        learner.update(*scored)
    assert same(before, snapshot(learner))


def test_an_engine_with_other_weights_stops_a_synchronous_run(model: Path, scored: Scored) -> None:
    learner = Learner(tiny_run(model, learner={"max_mismatch": 0.1}))
    shifted = with_group(scored, logprobs=scored[0][1].logprobs - 1.0)
    before = snapshot(learner)
    with pytest.raises(LearnerError, match=r"differ by 0\.333 nats a token on average, learner\.max_mismatch is 0\.1"):
        learner.update(*shifted)
    assert same(before, snapshot(learner))
    tolerant = Learner(tiny_run(model, learner={"max_mismatch": None}))
    assert tolerant.update(*shifted)["mismatch/max_abs_logprob"] == pytest.approx(1.0, abs=1e-4)


def test_an_older_group_is_weighed_by_the_log_probabilities_recorded_when_it_was_sampled(
    model: Path, scored: Scored
) -> None:
    run = tiny_run(model)
    run = run.model_copy(update={"pipeline": run.pipeline.model_copy(update={"max_staleness": 2})})
    learner = Learner(run)
    learner.version = 1
    groups = [dataclasses.replace(group, policy_version=1) for group in scored[0]]
    groups[1] = dataclasses.replace(groups[1], policy_version=0, logprobs=groups[1].logprobs - np.float32(np.log(2)))
    metrics = learner.update(groups, scored[1])
    assert metrics["ratio/max"] == pytest.approx(2.0, abs=1e-3)
    assert metrics["mismatch/max_abs_logprob"] < 1e-4  # measured on groups of the learner's own version
    assert metrics["staleness/max"] == 1.0


def one_update_late(model: Path, scored: Scored, **algorithm: Any) -> tuple[Learner, Scored]:
    """A learner one update ahead of groups that are really its own; the policy term alone makes the gradient."""
    run = tiny_run(
        model,
        algorithm={"beta": 0.0, "entropy_reward": 0.0, **algorithm},
        pipeline={"max_staleness": 1},
        rollout={"guidance_scale": 3.0},
    )
    learner = Learner(run)
    learner.version = 1
    return learner, scored


@pytest.mark.parametrize(
    ("algorithm", "factor", "clipped"),
    [({"correction": "none"}, 4.0, 0.0), ({}, 2.0, 1.0), ({"correction": "mask"}, 0.0, 1.0)],
)
def test_tokens_that_became_four_times_as_likely_pull_as_the_correction_says(
    model: Path, scored: Scored, algorithm: dict[str, Any], factor: float, clipped: float
) -> None:
    learner, (groups, scores) = one_update_late(model, scored, **algorithm)
    fresh = learner.update([dataclasses.replace(group, policy_version=1) for group in groups], scores)
    assert {name: fresh[name] for name in ("ratio/mean", "ratio/max", "ratio/clipped", "ess", "staleness/0")} == {
        "ratio/mean": 1.0,
        "ratio/max": 1.0,
        "ratio/clipped": 0.0,
        "ess": 1.0,
        "staleness/0": 1.0,
    }
    late, _ = one_update_late(model, scored, **algorithm)
    older = [dataclasses.replace(group, logprobs=group.logprobs - np.float32(np.log(4))) for group in groups]
    metrics = late.update(older, scores)
    assert metrics["grad_norm"] == pytest.approx(factor * fresh["grad_norm"], rel=1e-3)
    assert metrics["ratio/mean"] == pytest.approx(4.0, abs=1e-3)
    assert metrics["ratio/clipped"] == clipped
    assert metrics["ess"] == pytest.approx(0.0 if factor == 0 else 1.0, abs=1e-4)
    assert (metrics["staleness/mean"], metrics["staleness/0"], metrics["staleness/1"]) == (1.0, 0.0, 1.0)


def test_the_guided_ratio_is_that_of_what_was_sampled_and_still_trains_the_conditional_branch(
    model: Path, scored: Scored
) -> None:
    learner, (groups, scores) = one_update_late(model, scored, ratio_on="guided")
    rule, older = SamplingParams(guidance_scale=3.0), []
    for group in groups:
        prompts = [learner.policy.codec.encode_prompt(group.prompt.text)] * len(group.tokens)
        now = learner.policy.guided_token_logprobs(prompts, torch.from_numpy(group.tokens).long(), rule).guided_logprobs
        assert now is not None
        older.append(
            dataclasses.replace(group, guided_logprobs=(now - np.log(1.5)).numpy(), logprobs=group.logprobs - 9)
        )
    metrics = learner.update(older, scores)
    assert metrics["ratio/mean"] == pytest.approx(1.5, abs=1e-3)
    assert metrics["ratio/max"] == pytest.approx(1.5, abs=1e-2)
    fresh, _ = one_update_late(model, scored)
    own = fresh.update([dataclasses.replace(group, policy_version=1) for group in groups], scores)
    assert metrics["grad_norm"] == pytest.approx(1.5 * own["grad_norm"], rel=1e-3)


def test_the_gradient_is_clipped_to_its_norm(model: Path, scored: Scored) -> None:
    run = tiny_run(model, learner={"max_grad_norm": 1e-9})
    # with so small a gradient AdamW's epsilon (1e-8) holds the step far below the learning rate
    learner = Learner(run)
    before = snapshot(learner)
    assert learner.update(*scored)["grad_norm"] > 1e-3
    assert max((tensor - before[name]).abs().max().item() for name, tensor in learner.weights()) < 1e-4


def test_the_learning_rate_warms_up_and_decays() -> None:
    linear = LearnerConfig(lr=1.0, warmup_steps=2)
    assert [learning_rate(step, 6, linear) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    constant = LearnerConfig(lr=1.0, schedule="constant", warmup_steps=2)
    assert [learning_rate(step, 6, constant) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_bfloat16_stays_close_to_float32(model: Path, scored: Scored) -> None:
    full = Learner(tiny_run(model)).update(*scored)
    learner = Learner(tiny_run(model, learner={"autocast": "bfloat16"}))
    half = learner.update(*scored)
    assert half["kl"] == 0.0  # policy and reference round alike
    assert 0 < half["mismatch/abs_logprob"] < 0.05
    assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.2)
    assert all(tensor.dtype == torch.float32 for _, tensor in learner.weights())


def test_whether_the_hardware_has_bfloat16_is_asked_of_torch() -> None:
    flags = torch.cpu.get_capabilities()
    assert hardware_has_bfloat16(torch.device("cpu")) == bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def test_it_uses_as_many_threads_as_it_is_told(model: Path) -> None:
    """In a process of its own: once vLLM is imported on a CPU, torch's number of threads is fixed."""
    script = (
        "import sys, torch; from pathlib import Path; from stage_ray.learner.learner import Learner;"
        "from tests.learner_case import tiny_run\n"
        "for threads in (2, 1):\n"
        "    Learner(tiny_run(Path(sys.argv[1])), threads=threads)\n"
        "    assert torch.get_num_threads() == threads"
    )
    subprocess.run([sys.executable, "-c", script, str(model)], check=True, cwd=Path(__file__).parents[2])
