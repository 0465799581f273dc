from __future__ import annotations

import doctest
import importlib
import math
import pkgutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stage_ray.algorithm as algorithm
from stage_ray.algorithm import (
    combine_rewards,
    group_advantages,
    k3_kl,
    opposite_sign_similarity,
    policy_loss,
    stage_loss,
)
from stage_ray.algorithm.losses import TokenWeights, token_weights, weighted_loss


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_example_in_the_docstrings_holds() -> None:
    for module in pkgutil.iter_modules(algorithm.__path__, "stage_ray.algorithm."):
        results = doctest.testmod(importlib.import_module(module.name))
        assert results.attempted > 0, f"{module.name} shows no example"
        assert results.failed == 0


def test_a_capped_kl_is_bounded_pulls_a_token_beyond_with_the_greatest_slope_and_leaves_others_alone() -> None:
    logp = torch.zeros(5, requires_grad=True)
    reference = torch.tensor([-30.0, -1.0, 1.0, 10.0, 89.0])
    capped, plain = k3_kl(logp, reference, ratio_cap=20.0), k3_kl(logp, reference)
    assert torch.equal(capped[:3], plain[:3]) and plain[4].isinf()
    torch.testing.assert_close(capped[3:], torch.full((2,), 19 - math.log(20)))
    (slope,) = torch.autograd.grad(capped.sum(), logp)
    assert torch.equal(slope[:3], torch.autograd.grad(plain[:3].sum(), logp)[0][:3])
    torch.testing.assert_close(slope[3:], torch.full((2,), -19.0))


@pytest.mark.parametrize(
    ("cosine", "weight", "kappa", "slope"), [(0.6, 0.2, 1.0, 0.3535), (-1.0, 1.0, 0.5, 0.3535), (1.0, 0.0, 1.0, 0.0)]
)
def test_the_papers_toy_of_two_images_of_one_token(cosine: float, weight: float, kappa: float, slope: float) -> None:
    book = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])
    advantages = group_advantages(combine_rewards(torch.tensor([[[1.0], [0.0]]]), drop_constant=True))
    similarity = opposite_sign_similarity(torch.tensor([[[0], [1]]]), book, advantages)
    weights = token_weights(similarity, similarity)
    torch.testing.assert_close(weights.policy * (2 * weight + 1e-6), torch.full((1, 2, 1), weight))
    torch.testing.assert_close(weights.kl * 2, torch.full((1, 2, 1), kappa))
    logp = torch.full((1, 2, 1), -2.0, requires_grad=True)
    loss = stage_loss(logp, logp.detach(), None, advantages, similarity, beta=0.03)
    loss.loss.backward()
    assert abs(loss.policy.item()) < 1e-7  # J is 0 in value, only its gradient acts
    assert loss.kl.item() == 0
    torch.testing.assert_close(logp.grad, torch.tensor([[[-slope], [slope]]]), atol=1e-4, rtol=0)


def test_k3_is_the_plain_formula_where_that_can_be_computed() -> None:
    logp, reference = random(0, 50), random(1, 50)
    d = reference - logp
    torch.testing.assert_close(k3_kl(logp, reference), d.exp() - d - 1)


@settings(deadline=None)
@given(st.floats(-1e-3, 1e-3))
def test_k3_keeps_its_digits_next_to_the_reference(d: float) -> None:
    difference = torch.tensor([d], dtype=torch.float32)
    exact = k3_kl(torch.zeros(1, dtype=torch.float64), difference.double()).item()
    # one unit in the last place of d; the plain formula is off by one of 1.0, over a thousand times as much
    assert k3_kl(torch.zeros(1), difference).item() == pytest.approx(exact, rel=0, abs=2.4e-7 * abs(d) + 1e-30)


def test_k3_averages_to_the_kl_over_the_policys_own_tokens() -> None:
    logp, reference = random(2, 9).log_softmax(-1), random(3, 9).log_softmax(-1)
    expected = (logp.exp() * (logp - reference)).sum()
    torch.testing.assert_close((logp.exp() * k3_kl(logp, reference)).sum(), expected)


def test_each_group_is_normalised_by_its_own_weights_and_groups_count_alike() -> None:
    logp = torch.zeros(2, 2, 1)
    weight = torch.tensor([[[1.0], [0.0]], [[0.1], [0.3]]])
    loss = policy_loss(logp, logp, torch.tensor([[1.0, 5.0], [2.0, -2.0]]), weight=weight)
    # group 0: -1; group 1: -(0.1 * 2 - 0.3 * 2) / 0.4 = 1
    assert loss.item() == pytest.approx(0.0, abs=1e-5)


def test_a_group_whose_images_agree_everywhere_adds_nothing_and_is_finite() -> None:
    logp = torch.zeros(1, 2, 3, requires_grad=True)
    policy_loss(logp, None, torch.tensor([[1.0, -1.0]]), weight=torch.zeros(1, 2, 3)).backward()
    assert torch.equal(logp.grad, torch.zeros(1, 2, 3))


def test_the_ratio_is_one_against_the_policy_itself_and_exp_of_the_difference_against_another() -> None:
    logp, behavior = random(4, 1, 2, 3), random(5, 1, 2, 3)
    advantages = torch.tensor([[1.5, -0.5]], dtype=torch.float64)
    own = policy_loss(logp, None, advantages)
    torch.testing.assert_close(own, -advantages.mean(), atol=1e-6, rtol=1e-6)
    other = policy_loss(logp, behavior, advantages)
    torch.testing.assert_close(other, -((logp - behavior).exp() * advantages[..., None]).mean(), atol=1e-6, rtol=1e-6)


def test_no_gradient_reaches_the_behaviour_policy_or_the_reported_parts() -> None:
    logp, behavior = random(4, 1, 2, 3).requires_grad_(), random(5, 1, 2, 3).requires_grad_()
    loss = stage_loss(logp, behavior, behavior, torch.tensor([[1.0, -1.0]]), None, beta=0.0)
    loss.loss.backward()
    assert behavior.grad is None or torch.equal(behavior.grad, torch.zeros_like(behavior))
    assert not loss.policy.requires_grad
    assert not loss.kl.requires_grad


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),  # a gain beyond the clip is not pursued
        (1.5, -1.0, 1.5, 1.5),  # a loss beyond it is
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 1.0, -1.1, -1.1),  # inside, nothing is clipped
    ],
)
def test_the_clip_is_ppos(ratio: float, advantage: float, value: float, slope: float) -> None:
    logp = torch.full((1, 2, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64)
    advantages = torch.tensor([[advantage, 0.0]], dtype=torch.float64)
    loss = policy_loss(logp, torch.zeros(1, 2, 1, dtype=torch.float64), advantages, weight=weight, clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-5)
    assert logp.grad[0, 0, 0].item() == pytest.approx(slope, abs=1e-5)


def test_autograd_agrees_with_finite_differences() -> None:
    logp, reference, behavior = random(6, 2, 3, 4).requires_grad_(), random(7, 2, 3, 4), random(8, 2, 3, 4)
    advantages, similarity = random(9, 2, 3), random(10, 2, 3, 4).clamp(-1, 1)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return stage_loss(x, reference, behavior, advantages, similarity, beta=0.3, clip=0.2).loss

    assert torch.autograd.gradcheck(loss, (logp,))


def test_both_switches_off_is_plain_grpo_and_so_is_no_similarity() -> None:
    logp, reference, advantages = random(11, 2, 3, 4), random(12, 2, 3, 4), random(13, 2, 3)
    similarity = random(14, 2, 3, 4).clamp(-1, 1)
    off = {"reweight_advantage": False, "reweight_kl": False}
    switched = stage_loss(logp, reference, None, advantages, similarity, beta=0.1, **off)
    absent = stage_loss(logp, reference, None, advantages, None, beta=0.1)
    plain = -advantages.mean() + 0.1 * k3_kl(logp, reference).mean()
    torch.testing.assert_close(switched.loss, absent.loss)
    torch.testing.assert_close(absent.loss, plain, atol=1e-6, rtol=1e-6)


def test_the_loss_is_its_parts() -> None:
    logp, reference, advantages = random(15, 2, 3, 4), random(16, 2, 3, 4), random(17, 2, 3)
    loss = stage_loss(logp, reference, None, advantages, None, beta=0.7)
    torch.testing.assert_close(loss.loss, loss.policy + 0.7 * loss.kl)


def test_one_advantage_a_token_is_taken_as_it_is() -> None:
    logp, advantages = random(18, 2, 3, 4), random(19, 2, 3)
    spread = advantages.unsqueeze(-1).expand(2, 3, 4)
    torch.testing.assert_close(policy_loss(logp, None, spread), policy_loss(logp, None, advantages))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 7))
def test_micro_batches_add_up_to_the_whole_batch_in_loss_and_gradient(seed: int, images: int) -> None:
    logp = random(seed, 2, 3, 4).requires_grad_()
    reference, behavior, advantages = random(seed + 1, 2, 3, 4), random(seed + 2, 2, 3, 4), random(seed + 3, 2, 3)
    similarity = random(seed + 4, 2, 3, 4).clamp(-1, 1)
    whole = stage_loss(logp, reference, behavior, advantages, similarity, beta=0.3, clip=0.2)
    whole.loss.backward()
    weights = token_weights(reference, similarity)
    pieces = logp.detach().flatten(0, 1).requires_grad_()
    total = 0.0
    for rows in torch.randperm(6, generator=torch.Generator().manual_seed(seed)).split(images):
        part = weighted_loss(
            pieces[rows],
            reference.flatten(0, 1)[rows],
            behavior.flatten(0, 1)[rows],
            advantages.flatten()[rows],
            TokenWeights(policy=weights.policy.flatten(0, 1)[rows], kl=weights.kl.flatten(0, 1)[rows]),
            beta=0.3,
            clip=0.2,
        )
        part.loss.backward()
        total += part.loss.item()
    assert total == pytest.approx(whole.loss.item(), abs=1e-12)
    torch.testing.assert_close(pieces.grad.view_as(logp), logp.grad)


def test_a_similarity_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="similarity must be"):
        stage_loss(random(0, 1, 2, 3), random(0, 1, 2, 3), None, random(0, 1, 2), random(0, 1, 2, 4), beta=0.0)
