"""Every option of ``recipe: stage`` against the published step in loops: loss, gradient, and gradient in entropies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from stage_ray.recipes import load_recipe
from stage_ray.recipes.base import Credit, Objective, PolicyOutputs, ReferenceOutputs
from tests.algorithm.literal_stage import LiteralStep, literal_step
from tests.recipes import literal
from tests.recipes.test_literal import G, T, a_group, batch_of, run_with

BETA, PROGRESS, LR_FACTOR = 0.1, 0.1, 0.25
OFF = {"entropy_reward": 0.0}
REFERENCE_ENTROPY = 1.1
OPTIONS: dict[str, dict[str, Any]] = {  # ours -> what the loops are told
    "defaults": {},
    "kl_floor": {"kl_floor": 0.2},
    "kl_slope": {"kl_slope": 0.9},
    "weight_cap": {"weight_cap": 1.2 / (G * T)},
    "progressive": {"progressive": True},
    "drop_silent_kl": {"drop_silent_kl": True},
    "kl_follows_lr": {"kl_follows_lr": True},
    "entropy_penalty": {"entropy_penalty": 0.01},
}


def groups() -> list[literal.Group]:
    """Of two scorers: telling ones, none that tells, and one whose images are still too bad for both."""
    found = [a_group(seed, scorers=2) for seed in (21, 22, 23)]
    found[1].scores = [[0.5, 0.5]] * G
    found[2].scores = [[0.3 + 0.01 * i, 0.25 * (i == 0)] for i in range(G)]
    return found


def literal_of(group: literal.Group, options: dict[str, Any]) -> LiteralStep:
    told = dict(options)
    told["progress"] = PROGRESS if told.pop("progressive", False) else None
    told["kl_scale"] = LR_FACTOR if told.pop("kl_follows_lr", False) else 1.0
    return literal_step(
        group.scores,
        [sum(row) / T for row in group.entropy],
        [REFERENCE_ENTROPY] * G,
        group.tokens,
        group.codebook,
        group.logp,
        group.reference,
        weights=[1.0, 1.0],
        drop_constant=True,
        entropy_weight=told.pop("entropy_reward", 0.4),
        beta=BETA,
        **told,
    )


def ours(
    some: list[literal.Group], options: dict[str, Any], cut: int
) -> tuple[float, torch.Tensor, torch.Tensor, Credit]:
    """Loss, its gradients in log-probabilities and entropies [N, G, T], and the credit, in micro-batches of ``cut``."""
    recipe = load_recipe(run_with("stage", scorers=2, algorithm={"beta": BETA, **options}))
    assert recipe.needs_entropy_grad == ("entropy_penalty" in options)
    batch = replace(batch_of(some), progress=PROGRESS, lr_factor=LR_FACTOR)
    logp = torch.tensor([group.logp for group in some], dtype=torch.float64, requires_grad=True)
    entropy = batch.entropy.clone().requires_grad_()
    reference = torch.tensor([group.reference for group in some], dtype=torch.float64)
    seen = ReferenceOutputs(reference, torch.full_like(reference, REFERENCE_ENTROPY))
    credit, total = recipe.credit(batch, seen, 0), 0.0
    for indices in torch.randperm(len(some) * G, generator=torch.Generator().manual_seed(0)).split(cut):
        rows = logp.flatten(0, 1)[indices]
        outputs = PolicyOutputs(rows, rows.detach(), entropy.flatten(0, 1)[indices])
        objective: Objective = recipe.objective(outputs, seen.take(indices), credit.take(indices))
        objective.loss.backward()
        total += objective.loss.item()
    assert logp.grad is not None
    return total, logp.grad, torch.zeros_like(logp) if entropy.grad is None else entropy.grad, credit


@pytest.mark.parametrize("rewarded", [True, False], ids=["entropy reward", "no entropy reward"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_does_what_the_published_step_does_in_loops(name: str, rewarded: bool) -> None:
    options, some = OPTIONS[name] | ({} if rewarded else OFF), groups()
    steps = [literal_of(group, options) for group in some]
    for cut in (3 * G, 5):
        loss, gradient, slopes, credit = ours(some, options, cut)
        assert loss == pytest.approx(sum(step.loss for step in steps) / 3, rel=1e-6)
        torch.testing.assert_close(gradient, torch.tensor([step.gradient for step in steps]).double() / 3)
        wanted = torch.tensor([step.entropy_gradient for step in steps]).double() / 3  # of means over T tokens
        torch.testing.assert_close(slopes, wanted.unsqueeze(-1).expand(-1, -1, T) / T)
        torch.testing.assert_close(credit.advantages, torch.tensor([step.advantages for step in steps]).double())


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "defaults"])
def test_no_option_is_without_effect_on_these_groups(name: str) -> None:
    changed = [literal_of(group, OPTIONS[name] | OFF).loss for group in groups()]
    assert changed != pytest.approx([literal_of(group, OFF).loss for group in groups()])


def test_a_penalty_weighs_no_image_that_fills_the_share_of_a_rank() -> None:
    from stage_ray.learner.finite import without_copies

    *_, credit = ours(groups(), {"entropy_penalty": 0.01}, G)
    assert credit.images is not None
    kept = without_copies(credit, 1).images
    assert kept is not None and kept[2].tolist() == [0.0] * G
    torch.testing.assert_close(kept[:2], torch.full((2, G), 1 / (2 * G), dtype=torch.float64))
