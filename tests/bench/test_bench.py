"""The benches compare like with like, and say what they measured.

What is held here: the baselines do the same work as ours (same tokens for the same draws, same loss and gradients),
variants really run in turn, and rows state what was measured. No test looks at a ratio of speeds.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from rich.console import Console

from stage_ray import bench
from stage_ray.bench import pipeline
from stage_ray.bench.base import Bench, Measurement, Row, Variant, bench_run, interleave
from stage_ray.bench.baselines import PlainLearner, SingleProcessTrainer, plain_logprobs, plain_policy, plain_tokens
from stage_ray.bench.end_to_end import step_times
from stage_ray.bench.inputs import SMALL, equal_prompts, write_model
from stage_ray.bench.learner import random_groups
from stage_ray.bench.machine import PeakMemory, sampling_limit
from stage_ray.bench.rollout import Case, RolloutBench
from stage_ray.bench.sync import available, publish, row_of
from stage_ray.cli import main
from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.config.model_sizes import FLOAT32
from stage_ray.engines.base import ImageSequence
from stage_ray.engines.sampling import gumbel
from stage_ray.engines.torch import TorchEngine
from stage_ray.errors import RunError
from stage_ray.learner.learner import Learner
from stage_ray.observability.progress import Progress
from stage_ray.pipeline.ledger import Ledger
from stage_ray.policies.janus import JanusPolicy
from stage_ray.policies.janus.builder import checkpoint_sizes
from stage_ray.recipes import load_recipe
from stage_ray.registry import Registry
from stage_ray.samplers import process_logits
from tests.bench.variants import dying_variant, failing_variant, logging_variant
from tests.learner_case import PROMPTS, sample_groups, score, tiny_run
from tests.tiny import CODES, HIDDEN, IMAGE_TOKENS

CPU = torch.device("cpu")
GUIDANCE = 2.0
TEXTS = ("a photo of a red circle", "a photo of a blue ring", "a photo of a green square")  # equally long
KEYS = {
    "name",
    "ratio",
    "target",
    "met",
    "ratio_is",
    "baseline",
    "baseline_is",
    "ours",
    "unit",
    "better",
    "limit",
    "limit_is",
    "share_of_limit",
    "details",
    "notes",
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def policy(model: Path) -> JanusPolicy:
    return plain_policy(str(model), device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(model: Path) -> TorchEngine:
    rollout = {"engine": "torch", "dtype": "float32", "guidance_scale": GUIDANCE, "images_per_batch": 16}
    return TorchEngine(
        PolicyConfig.model_validate({"path": str(model)}), RolloutConfig.model_validate(rollout), worker="bench"
    )


def row(**changes: object) -> Row:
    whole = Row("rollout/x/torch", 3.0, 6.0, 3.0, "times as fast", "a loop", limit=1.5, limit_is="reading weights")
    return replace(whole, **changes)


# Baselines do the same work.


def test_the_plain_loop_draws_the_engines_tokens_when_given_the_engines_noise(
    policy: JanusPolicy, engine: TorchEngine
) -> None:
    prompts = [policy.codec.encode_prompt(text) for text in TEXTS]
    seeds = torch.arange(len(prompts))

    def draw(probabilities: torch.Tensor, step: int) -> torch.Tensor:
        noise = gumbel(seeds, torch.full_like(seeds, step), CODES)
        return (probabilities.log() + noise).argmax(dim=-1)

    drawn = engine.sample([ImageSequence(ids, seed) for seed, ids in enumerate(prompts)], engine.params)
    assert plain_tokens(policy, prompts, GUIDANCE, draw).tolist() == drawn.tokens.tolist()
    assert plain_tokens(policy, prompts, 5.0, draw).tolist() != drawn.tokens.tolist(), "guidance does something"
    found = plain_logprobs(policy, prompts, drawn.tokens)
    torch.testing.assert_close(found.logprobs, drawn.logprobs, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found.entropy, drawn.entropy, atol=2e-3, rtol=2e-3)


def test_the_plain_loops_own_draws_follow_the_guided_distribution(policy: JanusPolicy, engine: TorchEngine) -> None:
    ids, count = policy.codec.encode_prompt(TEXTS[0]), 900
    torch.manual_seed(0)
    tokens = plain_tokens(policy, [ids] * count, GUIDANCE)
    blank = torch.zeros(1, IMAGE_TOKENS, dtype=torch.int64)
    with torch.no_grad():
        branches = (policy.image_logits([branch], blank)[:, 0] for branch in (ids.conditional, ids.unconditional))
        expected = process_logits(*branches, engine.params).softmax(-1)[0]
    found = torch.bincount(tokens[:, 0], minlength=CODES) / count
    distance = 0.5 * (found - expected).abs().sum().item()
    chance = 0.5 * (2 * expected * (1 - expected) / (math.pi * count)).sqrt().sum().item()  # its mean for true samples
    assert distance < 2 * chance
    assert 0.5 * (1 / CODES - expected).abs().sum().item() > 4 * chance, "a flat distribution would be told apart"
    assert len(set(map(tuple, tokens.tolist()))) == count, "every image has draws of its own"


def test_the_plain_loop_wants_prompts_of_one_length(policy: JanusPolicy) -> None:
    prompts = [policy.codec.encode_prompt(text) for text in ("a photo of a ring", "a photo of two red rings")]
    with pytest.raises(ValueError, match="one length"):
        plain_tokens(policy, prompts, GUIDANCE)


@pytest.mark.parametrize("micro_batch_images", [12, 5])
def test_the_plain_update_has_our_loss_and_our_gradients(model: Path, micro_batch_images: int) -> None:
    run = tiny_run(model, learner={"micro_batch_images": micro_batch_images})
    plain, ours = PlainLearner(run), Learner(run)
    for version in range(2):  # in the first the policy is its own reference: no KL
        groups = sample_groups(ours.policy, PROMPTS, 4, version=version, seed=version)
        metrics, found = ours.update(groups, score(groups)), plain.update(groups, score(groups))
        assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-3, abs=1e-6)
        if version == 0:
            gradients = clipped_gradients(ours)
            assert sum(float(gradient.norm()) for gradient in gradients.values()) > 0.1
            for name, gradient in clipped_gradients(plain).items():
                torch.testing.assert_close(gradient, gradients[name], atol=1e-5, rtol=2e-3)
    kl = (found["loss"] - found["policy_loss"]) / load_recipe(run).options.beta
    assert kl == pytest.approx(metrics["kl/weighted"], rel=1e-2) and kl > 0
    for name, parameter in plain.policy.trained_parameters().items():
        torch.testing.assert_close(parameter, ours.policy.trained_parameters()[name], atol=2e-4, rtol=1e-3)


def clipped_gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """Of the first update: AdamW's first moment after one step is a tenth of them."""
    state = learner._optimizer.state
    return {name: 10 * state[parameter]["exp_avg"] for name, parameter in learner.policy.trained_parameters().items()}


def test_the_single_process_trainer_trains_on_what_it_draws(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    run = tiny_run(
        model,
        prompts={"train": str(tmp_path / "prompts.txt")},
        rollout={"group_size": 4, "groups_per_step": 2},
        rewards=[{"type": "tests.scorers.Brightness"}],
    )
    trainer = SingleProcessTrainer(run)
    learner = trainer.learner
    parameters = learner.policy.trained_parameters()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    trainer.step()
    trainer.step()
    assert learner.version == 2
    assert all(not torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    drawn = trainer.generate()
    assert [group.prompt.text for group in drawn] == [TEXTS[1], TEXTS[2]], "prompts go round"
    assert drawn[0].images.shape[0] == 4 and drawn[0].images.std() > 0


# Models, prompts, groups.


def test_a_model_of_any_size_is_a_checkpoint_that_every_part_loads(tmp_path: Path) -> None:
    path = write_model(tmp_path / "small", SMALL)
    policy = JanusPolicy.load(PolicyConfig.model_validate({"path": str(path)}), device=CPU)
    assert (policy.image_tokens, policy.codebook_size) == (SMALL.side**2, SMALL.codes)
    layers = policy.backbone.layers
    assert checkpoint_sizes(str(path)).layer == sum(parameter.numel() for parameter in layers[0].parameters())
    pairs = equal_prompts(policy.codec.encode_prompt)[:3]
    assert len({len(ids.conditional) for _, ids in pairs}) == 1 and len({prompt.text for prompt, _ in pairs}) == 3
    assert all(0 not in ids.conditional for _, ids in pairs), "no padding"
    groups, scored = random_groups(policy, version=3)
    assert groups[0].tokens.max() > SMALL.codes // 2 and groups[0].policy_version == 3
    assert len(np.unique(scored[0].scores)) == len(scored[0].scores), "every group tells its images apart"


def test_the_limit_counts_the_weights_and_the_cache_that_a_token_needs(model: Path) -> None:
    sizes = replace(checkpoint_sizes(str(model)), image_tokens=2)
    head_dim, kv_heads, heads, intermediate, layers = 32, 1, 2, 128, 2
    attention = 2 * HIDDEN * heads * head_dim + 2 * HIDDEN * kv_heads * head_dim
    weights = layers * (attention + 3 * HIDDEN * intermediate + 2 * HIDDEN)
    weights += HIDDEN * HIDDEN + HIDDEN + HIDDEN * CODES + CODES
    cache = layers * 2 * kv_heads * head_dim
    case = {"sequences": 4, "prompt": 0, "dtype": "float32"}
    slow_memory, which = sampling_limit(sizes, **case, speed={"float32": 1e15, "bytes_per_s": 1e6})
    assert slow_memory == pytest.approx(4 * (2 * weights + 4 * cache) / 1e6)
    assert which.startswith("reading weights")
    slow_sums, which = sampling_limit(sizes, **case, speed={"float32": 1e6, "bytes_per_s": 1e15})
    assert slow_sums == pytest.approx(2 * weights * 4 * 2 / 1e6)
    assert which.startswith("matrix products")


def test_peak_memory_sees_what_was_freed_again() -> None:
    peak = PeakMemory(CPU)
    before = peak.rise_mib()
    block = np.ones(96 * 2**20, np.uint8)
    del block
    assert 90 < peak.rise_mib() - before < 200
    assert PeakMemory(CPU).rise_mib() < 60, "each starts anew"


# Trials of variants run in turn, each variant in a process of its own.


def quiet() -> Progress:
    return Progress(Console(file=Path(os.devnull).open("w")))


def test_variants_run_in_turn_in_fresh_processes_with_every_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage_ray.bench.base.usable_cpus", lambda: 5)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    log = tmp_path / "log"
    variants = [Variant(name, logging_variant, {"log": str(log), "name": name}) for name in "ab"]
    trials = interleave(variants, repeats=2, progress=quiet(), title="test", warmups=1)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [name for name, _, _ in lines] == ["a", "b"] * 3
    assert len({pid for _, pid, _ in lines}) == 2 and str(os.getpid()) not in {pid for _, pid, _ in lines}
    assert {threads for _, _, threads in lines} == {"5"} and os.environ["OMP_NUM_THREADS"] == "3"
    assert trials == {name: [{"seconds": 2.0}, {"seconds": 3.0}] for name in "ab"}, "the warm-up does not count"


@pytest.mark.parametrize(
    ("build", "why"), [(failing_variant, "ValueError: lame has no legs"), (dying_variant, "ended with exit code 7")]
)
def test_a_variant_that_fails_ends_the_bench_with_its_reason(build: object, why: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"lame failed: .*{why}.*its log is"):
        interleave([Variant("lame", build, {"log": "", "name": "lame"})], repeats=1, progress=quiet(), title="test")


# The driver's bench drives the driver.


@pytest.mark.parametrize(("staleness", "hidden"), [(0, False), (2, True)])
def test_stages_overlap_as_far_as_staleness_allows(staleness: int, hidden: bool) -> None:
    stages = (0.1, 0.05, 0.1)
    trial = next(pipeline.driven(stages, staleness, steps=6 + staleness + 2, groups=8))
    assert trial["seconds"] >= max(stages)
    assert (trial["seconds"] < 0.9 * sum(stages)) == hidden
    assert trial["group_s"] > trial["ledger_s"] > 0
    row = pipeline.overlap_row(staleness, stages, [trial])
    assert row.share_of_limit is not None and row.share_of_limit <= 1.0
    assert not pipeline.overlap_row(0, stages, [{"seconds": sum(stages)}]).met


def test_the_driver_takes_every_group_of_the_run(tmp_path: Path) -> None:
    rollout = {"group_size": 8, "groups_per_step": 20, "images_per_batch": 160, "workers": 64}
    run = bench_run(steps=3, rollout=rollout, scoring={"workers": 16}, pipeline={"max_staleness": 1})
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert len(asyncio.run(pipeline.drive(run, (0.0, 0.0, 0.0), ledger))) == 3
    events = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    names = [event["event"] for event in events]
    assert names.count("trained") == 60 and "dropped" not in names
    stale = {event["step"] - event["policy_version"] for event in events if event["event"] == "trained"}
    assert stale == {0, 1}, "the first batch is fresh, later ones lag by the bound"


@pytest.mark.parametrize(("group_s", "met"), [(4e-3, False), (1e-3, True)])
def test_the_drivers_cost_is_held_against_its_allowance(group_s: float, met: bool) -> None:
    cost = pipeline.cost_row([{"group_s": group_s, "ledger_s": 1e-4}], held=1000)
    assert cost.ratio == pytest.approx(group_s / 3e-3) and cost.met is met
    assert cost.share_of_limit == pytest.approx(1e-4 / group_s)


def test_a_row_of_each_transport_counts_the_copies_that_it_cannot_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage_ray.bench.sync.usable_cpus", lambda: 2)
    stages = {f"{name}_s": 0.1 for name in ("copy", "read", "pack", "store", "load", "first")}
    trials = [stages | {"seconds": 0.4, "workers": 2, "nbytes": 1000}]
    assert available("cpu") == ["object_store", "gloo"]
    stored, passed = (row_of(name, trials) for name in available("cpu"))
    assert (stored.name, passed.name) == ("sync/publish", "sync/publish/gloo")
    assert (stored.limit, passed.limit) == (pytest.approx(0.15), pytest.approx(0.2))
    assert stored.ratio == passed.ratio == pytest.approx(0.25)


def test_end_to_end_reads_seconds_from_a_runs_own_files(tmp_path: Path) -> None:
    metrics = [{"step": i + 1, "images": 64.0, "images_per_s": 64 / (i + 1)} for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)) + "\n")
    assert step_times(tmp_path) == pytest.approx([1.0, 2.0, 3.0, 4.0])


# Rows, tables, the command.


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({"baseline": 9.0}, True),
        ({"baseline": 8.97}, False),
        ({"baseline": math.nan}, False),
        ({"ours": 3.0, "target": 0.5, "better": "lower"}, True),
        ({"ours": 3.06, "target": 0.5, "better": "lower"}, False),
        ({"ours": math.nan, "better": "lower"}, False),
    ],
)
def test_a_row_is_met_only_at_its_target_or_better(changes: dict[str, object], met: bool) -> None:
    assert row(**changes).met is met
    assert row(**changes).to_json()["met"] is met


def test_a_row_tells_everything_there_is_to_judge_it_by() -> None:
    data = row(details={"images_per_s": 21.5}, notes=("64 images",)).to_json()
    assert data.keys() == KEYS
    assert data["ratio"] == 2.0 and row(better="lower").ratio == 0.5
    assert data["share_of_limit"] == 0.5 and data["details"] == {"images_per_s": 21.5}
    assert row(limit=None).to_json()["share_of_limit"] is None


def test_json_holds_what_is_printed_and_a_missed_target_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    class FakeBench(Bench):
        def rows(self) -> list[Row]:
            name = names[len(asked)]
            asked.append((name, self.device, self.quick))
            return [row(name=f"{name}/a"), row(name=f"{name}/b", baseline=29.61, details={"images_per_s": 123.4})]

    names = bench.bench_names()
    monkeypatch.setattr(Registry, "find", lambda registry, name, key: FakeBench)
    path = tmp_path / "all.json"
    assert main(["bench", "all", "--json", str(path), "--device", "cpu", "--quick"]) == 0
    assert asked == [(name, "cpu", True) for name in names]
    rows = json.loads(path.read_text())
    assert [one["name"] for one in rows] == [f"{name}/{case}" for name in names for case in "ab"]
    assert [one["met"] for one in rows] == [False, True] * len(names)
    printed = capsys.readouterr().out
    for one in rows:
        assert one.keys() >= KEYS | {"machine", "device", "quick"}
        assert one["machine"]["torch"] in printed and one["machine"]["cpu"] in printed
        assert one["name"] in printed and f"{one['ratio']:.2f}" in printed and one["limit_is"] in printed
    assert "123.4" in printed and "7 of 14 targets met" in printed


def test_bench_help_names_every_bench_and_each_can_be_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in (*bench.bench_names(), "all", "--json", "--quick", "--device"):
        assert name in shown
    assert "Example: stage-ray bench" in shown
    found = [bench.BENCHES.find(name, "bench") for name in bench.BENCHES.names()]
    assert len(found) == 7 and all(issubclass(one, Bench) for one in found)


def test_a_way_to_decode_is_evaluated_with_its_score_diversity_and_seconds(tmp_path: Path) -> None:
    from stage_ray.bench.samplers import evaluations, means, write_index

    index = {"sampler": "retrieval", "sampler_options": {"index": str(write_index(tmp_path, 3))}}
    plain, retrieved = (next(evaluations(it, prompts=2, images=2, gpus=0.0)) for it in ({}, index))
    assert plain.keys() == retrieved.keys() == {"seconds", "GenEval", "error", "diversity"}
    assert plain["seconds"] > 0 and means([plain]) != means([retrieved]) and 0 <= plain["diversity"] <= 2


@pytest.mark.parametrize("arguments", [["rollouts"], ["rollout", "--device", "tpu"], []])
def test_wrong_usage_of_bench_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rollout", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_a_rollout_bench_of_a_tiny_model_gives_whole_rows(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(variants: list[Variant], *, repeats: int, **_: object) -> dict[str, list[Measurement]]:
        trials = {variant.name: variant.trials(**variant.options) for variant in variants}
        return {name: [next(found) for _ in range(repeats)] for name, found in trials.items()}

    monkeypatch.setattr("stage_ray.bench.rollout.interleave", in_this_process)
    case = Case("tiny", None, 8, "float32", {"torch": 3.0, "best": 2.5}, repeats=2)
    rows = RolloutBench(device="cpu", quick=True, progress=quiet()).measure(case, str(model), ["torch"])
    assert [one.name for one in rows] == ["rollout/tiny/torch", "rollout/tiny/best"]
    for one in rows:
        assert one.ratio == pytest.approx(one.baseline / one.ours) and one.ours > 0
        assert one.share_of_limit is not None and 0 < one.share_of_limit < 1
        alone, second = one.details["loop_alone_s"], one.details["second_forward_s"]
        assert alone > second > 0, "sixteen steps take longer than one forward"
        assert one.details["ratio_without_second_forward"] < one.ratio


@pytest.mark.slow
def test_a_broadcast_version_reaches_both_workers(model: Path) -> None:
    try:
        trials = publish(str(model), "cpu", "gloo")  # in this process, for its Ray is the only one here
        for found in (next(trials), next(trials)):
            assert found["seconds"] > found["pack_s"] + found["load_s"] > 0 < found["copy_s"]
            assert found["workers"] == 2 and found["nbytes"] == FLOAT32 * checkpoint_sizes(str(model)).trained
    finally:
        ray.shutdown()
