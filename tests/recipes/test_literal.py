"""Each recipe against its paper's formula in loops: the loss and its gradient in every log-probability, in float64."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from stage_ray.algorithm.divergence import estimated_divergence, exact_divergence
from stage_ray.config import RunConfig
from stage_ray.errors import ConfigError, RunError
from stage_ray.recipes import load_recipe
from stage_ray.recipes.base import GroupBatch, PolicyOutputs, Recipe, ReferenceOutputs
from stage_ray.recipes.diverse_grpo import spectral_clusters
from tests.learner_case import tiny_run
from tests.recipes import literal

GRID, G, V, D = (5, 6), 4, 7, 3
T = GRID[0] * GRID[1]
CODEBOOK = [[math.cos(7 * i + 2 * j) for j in range(D)] for i in range(V)]
KINDS = ("policy_reference", "reference_policy", "jensen_shannon")


def run_with(recipe: str, scorers: int = 1, **changes: Any) -> RunConfig:
    rewards = [{"type": "tests.scorers.Brightness", "name": f"scorer{i}"} for i in range(scorers)]
    return tiny_run(Path("unused"), recipe=recipe, rewards=rewards, **changes)


def a_group(seed: int, scorers: int = 1, *, stale: float = 0.0) -> literal.Group:
    """Random numbers of plausible size; ``stale``: how far the behaviour lies from the policy, nats."""
    rng = random.Random(seed)

    def table(low: float, high: float) -> literal.Table:
        return [[rng.uniform(low, high) for _ in range(T)] for _ in range(G)]

    logp = table(-4, -1)
    return literal.Group(
        tokens=[[rng.randrange(V) for _ in range(T)] for _ in range(G)],
        logp=logp,
        reference=[[x + rng.uniform(-0.8, 0.8) for x in row] for row in logp],
        behavior=[[x + rng.uniform(-stale, stale) for x in row] for row in logp],
        entropy=table(0.1, math.log(V)),
        guided_entropy=table(0.1, math.log(V)),
        scores=[[rng.uniform(0, 1) for _ in range(scorers)] for _ in range(G)],
        codebook=CODEBOOK,
        grid=GRID,
        features=[[rng.uniform(-1, 1) for _ in range(5)] for _ in range(G)],
    )


def batch_of(groups: list[literal.Group]) -> GroupBatch:
    def stacked(name: str) -> torch.Tensor:
        return torch.tensor([getattr(group, name) for group in groups], dtype=torch.float64)

    scorers = len(groups[0].scores[0])
    return GroupBatch(
        groups=(),
        scored=(),
        tokens=torch.tensor([group.tokens for group in groups]),
        logprobs=stacked("behavior"),
        guided_logprobs=stacked("behavior"),
        entropy=stacked("entropy"),
        guided_entropy=stacked("guided_entropy"),
        scores=stacked("scores"),
        scorers=tuple(f"scorer{i}" for i in range(scorers)),
        scorer_weights=torch.ones(scorers, dtype=torch.float64),
        guided=torch.ones(len(groups), dtype=torch.bool),
        staleness=torch.zeros(len(groups), dtype=torch.int64),
        features={"scorer0": stacked("features")},
        codebook=torch.tensor(groups[0].codebook, dtype=torch.float64),
        grid=GRID,
    )


def loss_and_gradient(recipe: Recipe, groups: list[literal.Group], cut: int) -> tuple[float, torch.Tensor]:
    """Of a batch in micro-batches of ``cut`` images; both distributions are the same, so guided recipes fit too."""
    batch = batch_of(groups)
    logp = torch.tensor([group.logp for group in groups], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([group.reference for group in groups], dtype=torch.float64)
    seen = ReferenceOutputs(reference, torch.zeros_like(reference), reference)
    credit, total = recipe.credit(batch, seen, 0), 0.0
    for indices in torch.randperm(len(groups) * G, generator=torch.Generator().manual_seed(0)).split(cut):
        rows, behavior = logp.flatten(0, 1)[indices], batch.logprobs.flatten(0, 1)[indices]
        outputs = PolicyOutputs(rows, behavior, torch.zeros_like(rows), rows, behavior)
        loss = recipe.objective(outputs, seen.take(indices), credit.take(indices)).loss
        loss.backward()
        total += loss.item()
    assert logp.grad is not None
    return total, logp.grad


def assert_literal(recipe: Recipe, groups: list[literal.Group], losses: list[literal.Loss]) -> None:
    """The batch's loss is the mean of its groups', in any cut."""
    expected = sum(loss(group.logp) for loss, group in zip(losses, groups, strict=True)) / len(groups)
    slopes = [literal.gradient(loss, group.logp) for loss, group in zip(losses, groups, strict=True)]
    wanted = torch.tensor(slopes, dtype=torch.float64) / len(groups)
    assert wanted.abs().max() > 1e-4
    for cut in (2 * G, 3):
        found, gradient = loss_and_gradient(recipe, groups, cut)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stale", [0.0, 0.5])
def test_ar_grpo_clips_the_ratio_of_the_guided_distribution(stale: float) -> None:
    run = run_with("ar_grpo", algorithm={"beta": 0.2, "clip": 0.2, "correction": "none"})
    groups = [a_group(seed, stale=stale) for seed in (1, 2)]
    assert_literal(load_recipe(run), groups, [literal.ar_grpo(group, 0.2, 0.2) for group in groups])


@pytest.mark.parametrize("recipe", ["ar_grpo", "guided_stage"])
@pytest.mark.parametrize(("key", "value"), [("top_k", 5), ("top_p", 0.9)])
def test_guided_ratios_refuse_samplers_that_leave_tokens_out(key: str, value: float, recipe: str) -> None:
    with pytest.raises(ConfigError, match=f"rollout.{key} = {value} must be .* with recipe {recipe}"):
        load_recipe(run_with(recipe, rollout={key: value}))


def test_guided_stage_is_stage_on_the_distribution_that_was_sampled() -> None:
    ours, stage = (load_recipe(run_with(recipe, algorithm={"beta": 0.2})) for recipe in ("guided_stage", "stage"))
    assert (ours.needs_guided, ours.needs_guided_grad, stage.needs_guided) == (True, True, False)
    batch = batch_of([a_group(seed, stale=0.5) for seed in (5, 6)])
    guided, behavior = (torch.rand(2, G, T, dtype=torch.float64).log() for _ in range(2))
    reference = guided - 0.3 * torch.rand_like(guided)
    seen = ReferenceOutputs(
        torch.rand_like(guided), torch.rand_like(guided), reference
    )  # its own branch is not looked at
    credit, every = ours.credit(batch, seen, 0), torch.arange(2 * G)
    assert (credit.weights.policy == stage.credit(batch, seen, 0).weights.policy).all()
    rows, conditional = (
        guided.flatten(0, 1).requires_grad_(),
        torch.rand(2 * G, T, dtype=torch.float64, requires_grad=True),
    )
    found = ours.objective(
        PolicyOutputs(conditional, conditional.detach(), conditional.detach(), rows, behavior.flatten(0, 1)),
        seen.take(every),
        credit.take(every),
    ).loss
    slope, untouched = torch.autograd.grad(found, [rows, conditional], allow_unused=True)
    plain = stage.objective(
        PolicyOutputs(rows, behavior.flatten(0, 1), conditional.detach()),
        ReferenceOutputs(reference.flatten(0, 1), seen.entropy.flatten(0, 1)),
        credit.take(every),
    ).loss
    assert untouched is None and found.item() == pytest.approx(plain.item())
    torch.testing.assert_close(slope, torch.autograd.grad(plain, rows)[0])


def test_gcpo_trains_its_critical_tokens_with_dynamic_weights() -> None:
    groups = [a_group(seed) for seed in (3, 4)]
    recipe = load_recipe(run_with("gcpo", algorithm={"beta": 0.1}))
    chosen = recipe.critical_tokens(batch_of(groups))  # type: ignore[attr-defined]
    for group, found in zip(groups, chosen, strict=True):
        assert [set(row.nonzero().flatten().tolist()) for row in found] == literal.critical_tokens(group)
    assert_literal(recipe, groups, [literal.gcpo(group, 0.1) for group in groups])


def test_eg_grpo_gates_advantages_by_entropy() -> None:
    groups = [a_group(seed) for seed in (5, 6)]
    recipe = load_recipe(run_with("eg_grpo", algorithm={"beta": 0.1}))
    assert_literal(recipe, groups, [literal.eg_grpo(group, 0.1) for group in groups])


@pytest.mark.parametrize("stale", [0.0, 0.5])
def test_pcpo_stops_pulling_where_the_log_ratio_has_moved(stale: float) -> None:
    groups = [a_group(seed, stale=stale) for seed in (7, 8)]
    recipe = load_recipe(run_with("pcpo", algorithm={"beta": 0.1, "xi": 0.25}))
    assert recipe.bounded
    assert_literal(recipe, groups, [literal.pcpo(group, 0.1, 0.25) for group in groups])


def test_a_next_scale_model_may_weigh_pcpos_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    group = a_group(7, stale=0.5)
    recipe = load_recipe(run_with("pcpo", algorithm={"beta": 0.0}))
    plain, _ = loss_and_gradient(recipe, [group], G)
    halves = torch.cat([torch.full((T // 2,), 2.0), torch.zeros(T - T // 2)])  # the later scale counts for nothing
    monkeypatch.setattr(type(recipe), "position_weights", lambda self, batch: halves)
    weighted, gradient = loss_and_gradient(recipe, [group], G)
    assert weighted != pytest.approx(plain)
    assert gradient[..., : T // 2].abs().max() > 0 and gradient[..., T // 2 :].abs().max() == 0


def test_diverse_grpo_rewards_small_clusters_and_holds_early_tokens() -> None:
    groups = [a_group(seed) for seed in (9, 10)]
    for group in groups:  # three images that look alike and one that does not
        group.features = [[1.0, 0.0, 0.02 * i, 0.0, 0.0] for i in range(3)] + [[0.0, 1.0, 0.0, 0.0, 0.0]]
    recipe = load_recipe(run_with("diverse_grpo", algorithm={"beta": 0.1, "bonus": 0.5}))
    assert_literal(recipe, groups, [literal.diverse_grpo(group, 0.1, 0.5, [3, 3, 3, 1], T // 3) for group in groups])


def test_a_group_that_no_scorer_tells_apart_gains_nothing_from_its_clusters() -> None:
    group = a_group(11)
    group.scores = [[0.5]] * G
    recipe = load_recipe(run_with("diverse_grpo"))
    assert not recipe.advantages(batch_of([group])).any()  # type: ignore[attr-defined]


def test_clusters_are_the_same_every_time_and_need_no_number() -> None:
    blocks = torch.eye(3).repeat_interleave(torch.tensor([4, 3, 1]), dim=0) + 0.01 * torch.arange(8.0)[:, None]
    assert spectral_clusters(blocks, sigma=0.3).tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert spectral_clusters(blocks, sigma=0.3, clusters=3).tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert spectral_clusters(torch.ones(4, 2), sigma=0.3).tolist() == [0, 0, 0, 0]


def test_diverse_grpo_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="algorithm.features = 'dino' is none of the scorers: scorer0, scorer1"):
        load_recipe(run_with("diverse_grpo", scorers=2, algorithm={"features": "dino"}))
    recipe = load_recipe(run_with("diverse_grpo", scorers=2, algorithm={"features": "scorer1"}))
    batch = batch_of([a_group(1, scorers=2)])
    with pytest.raises(RunError, match="'scorer1' must name a scorer that gives features; these do: scorer0"):
        recipe.credit(batch, ReferenceOutputs(batch.logprobs, batch.entropy), 0)


def test_synergy_mixes_two_scorers_token_by_token() -> None:
    groups = [a_group(seed, scorers=2) for seed in (12, 13)]
    recipe = load_recipe(run_with("synergy", scorers=2, algorithm={"beta": 0.1}))
    assert_literal(recipe, groups, [literal.synergy(group, 0.1, 0.4) for group in groups])


@pytest.mark.parametrize("scorers", [1, 3])
def test_synergy_needs_two_scorers(scorers: int) -> None:
    with pytest.raises(ConfigError, match=f"recipe = 'synergy' mixes two scorers, but rewards has {scorers}"):
        load_recipe(run_with("synergy", scorers=scorers))


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_the_sum_over_the_vocabulary(kind: Any) -> None:
    logp, logq = torch.randn(2, 3, 9, dtype=torch.float64).log_softmax(-1)
    expected = [literal.divergence(p, q, kind) for p, q in zip(logp.tolist(), logq.tolist(), strict=True)]
    assert exact_divergence(logp, logq, kind).tolist() == pytest.approx(expected)
    assert exact_divergence(logp, logp, kind).tolist() == pytest.approx([0] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_of_a_divergence_has_its_mean_and_the_mean_of_its_gradient(kind: Any) -> None:
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    logp, logq = logits.log_softmax(-1), torch.randn(9, dtype=torch.float64).log_softmax(-1)
    estimates = estimated_divergence(logp, logq, kind)  # of each token that may be drawn
    assert (estimates >= 0).all()
    mean = (logp.detach().exp() * estimates).sum()
    exact = exact_divergence(logp, logq, kind)
    assert mean.item() == pytest.approx(exact.item())
    found, expected = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (mean, exact))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("base", "exact"), [("grpo", False), ("stage", False), ("grpo", True), ("stage", True)])
def test_f_divergence_is_its_base_recipe_with_another_distance(base: str, exact: bool) -> None:
    groups, options = [a_group(14), a_group(15)], {"beta": 0.1, "entropy_reward": 0.0}
    mine = load_recipe(run_with("f_divergence", algorithm=options | {"base": base, "exact": exact}))
    theirs = load_recipe(run_with(base, algorithm={"beta": 0.0} | ({"entropy_reward": 0.0} if base == "stage" else {})))
    batch = batch_of(groups)
    logp, reference = torch.tensor([group.logp for group in groups], dtype=torch.float64), batch.logprobs - 0.1
    seen = ReferenceOutputs(reference, torch.zeros_like(reference))
    credits = [recipe.credit(batch, seen, 0) for recipe in (mine, theirs)]
    every = torch.arange(2 * G)
    vocabulary = torch.rand(2 * G, T, dtype=torch.float64)  # what the learner found over all logits
    rows, behavior = logp.flatten(0, 1), batch.logprobs.flatten(0, 1)
    outputs = PolicyOutputs(rows, behavior, rows, divergence=vocabulary if exact else None)
    found, plain = (
        recipe.objective(outputs, seen.take(every), credit.take(every)).loss
        for recipe, credit in zip((mine, theirs), credits, strict=True)
    )
    held = vocabulary if exact else estimated_divergence(rows, reference.flatten(0, 1), "jensen_shannon")
    assert mine.exact_divergence == ("jensen_shannon" if exact else None)
    assert found.item() == pytest.approx((plain + 0.1 * (credits[0].weights.kl.flatten(0, 1) * held).sum()).item())


@pytest.mark.parametrize("recipe", ["grpo", "stage", "ar_grpo", "guided_stage", "gcpo", "eg_grpo", "pcpo"])
def test_every_recipe_caps_the_kl_of_a_token_that_the_reference_likes_far_better(recipe: str) -> None:
    group = a_group(16)
    group.reference[0][0] = group.logp[0][0] + 95.0  # the first token is one that every recipe trains on
    uncapped, _ = loss_and_gradient(load_recipe(run_with(recipe)), [group], 2 * G)
    capped, _ = loss_and_gradient(load_recipe(run_with(recipe, algorithm={"kl_ratio_cap": 2.0})), [group], 2 * G)
    assert uncapped > 1e30 and abs(capped) < 100


def test_a_bounded_divergence_stays_so_however_far_the_reference_is() -> None:
    recipe = load_recipe(run_with("f_divergence", algorithm={"base": "grpo"}))
    batch = batch_of([a_group(17)])
    credit = recipe.credit(batch, ReferenceOutputs(batch.logprobs, batch.entropy), 0)
    every, rows = torch.arange(G), batch.logprobs.flatten(0, 1)
    far = ReferenceOutputs(batch.logprobs + 1000.0, batch.entropy)
    outputs = PolicyOutputs(rows, rows, rows, divergence=torch.full_like(rows, math.log(2)))
    assert math.isfinite(recipe.objective(outputs, far.take(every), credit.take(every)).loss.item())
