"""What tokens of an older policy may still weigh: by hand, and inside STAGE's loss."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from stage_ray.algorithm.losses import TokenWeights, k3_kl, policy_loss, stage_loss, token_weights, weighted_loss
from stage_ray.algorithm.off_policy import (
    Correction,
    beyond,
    corrected_ratio,
    effective_sample_size,
    guided_behavior,
    surrogate,
)
from stage_ray.config import AlgorithmConfig

TRUNCATE, MASK = Correction("truncate", cap=2.0), Correction("mask", low=0.5, high=2.0)
KINDS = (Correction(), TRUNCATE, MASK)
BETA = 0.1


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_ratios(*ratios: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities now (with gradient) and at sampling, of tokens with these ratios."""
    now = torch.full((len(ratios),), -3.0, dtype=torch.float64)
    return now.clone().requires_grad_(), now - torch.tensor(ratios, dtype=torch.float64).log()


def slope(value: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0]


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("correction", KINDS)
def test_a_fresh_token_has_a_ratio_of_exactly_one_whatever_the_correction(
    correction: Correction, clip: float | None
) -> None:
    logp, advantages = (random(0, 50) - 3).float().requires_grad_(), random(1, 50).float()
    for behavior in (logp.detach(), None):
        terms = surrogate(logp, behavior, advantages, clip=clip, correction=correction)
        assert torch.equal(terms, advantages)
        assert torch.equal(slope(terms, logp), advantages)
    assert not beyond(logp, logp.detach(), correction).any()


@pytest.mark.parametrize(
    ("correction", "weights", "touched"),
    [
        (Correction(), [4.0, 1.5, 1.0, 0.25], [False, False, False, False]),
        (TRUNCATE, [2.0, 1.5, 1.0, 0.25], [True, False, False, False]),
        (MASK, [0.0, 1.5, 1.0, 0.0], [True, False, False, True]),
    ],
)
def test_the_weight_and_the_gradient_of_each_correction_by_hand(
    correction: Correction, weights: list[float], touched: list[bool]
) -> None:
    now, then = with_ratios(4.0, 1.5, 1.0, 0.25)
    expected, advantages = torch.tensor(weights, dtype=torch.float64), torch.tensor([1.0, -2.0, 3.0, -4.0])
    torch.testing.assert_close(corrected_ratio(now, then, correction), expected)
    torch.testing.assert_close(
        slope(surrogate(now, then, advantages, correction=correction), now), advantages * expected
    )
    assert beyond(now, then, correction).tolist() == touched


@pytest.mark.parametrize(("correction", "weight"), [(TRUNCATE, 2.0), (MASK, 0.0)])
def test_a_ratio_too_great_for_a_float_is_corrected_like_any_other(correction: Correction, weight: float) -> None:
    now = torch.tensor([-1.0], requires_grad=True)
    terms = surrogate(now, torch.tensor([-200.0]), torch.ones(1), correction=correction)
    assert terms.item() == pytest.approx(weight)
    assert slope(terms, now).item() == pytest.approx(weight)


def test_the_clip_stops_the_gradient_only_where_the_advantage_has_had_its_way() -> None:
    now, then = with_ratios(1.5, 1.5, 0.5, 0.5)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    terms = surrogate(now, then, advantages, clip=0.2)
    torch.testing.assert_close(terms, torch.tensor([1.2, -1.5, 0.5, -0.8], dtype=torch.float64))
    torch.testing.assert_close(slope(terms, now), torch.tensor([0.0, -1.5, 0.5, 0.0], dtype=torch.float64))


def test_truncation_bounds_the_side_that_the_clip_leaves_open_and_a_masked_token_stays_zero_under_it() -> None:
    now, then = with_ratios(50.0)
    unwanted = torch.tensor([-1.0], dtype=torch.float64)
    assert slope(surrogate(now, then, unwanted, clip=0.2), now).item() == pytest.approx(-50)
    assert slope(surrogate(now, then, unwanted, clip=0.2, correction=TRUNCATE), now).item() == pytest.approx(-2)
    masked = surrogate(now, then, unwanted, clip=0.2, correction=MASK)
    assert (masked.item(), slope(masked, now).item()) == (0.0, 0.0)


def test_the_guided_ratio_is_of_the_guided_probabilities_and_its_gradient_of_the_conditional_one() -> None:
    conditional = torch.tensor([-2.0, -7.0, -1.0], requires_grad=True)
    now, then = torch.tensor([0.6, 0.1, 0.0]).log(), torch.tensor([0.3, 0.4, 0.5]).log()
    ratio = corrected_ratio(conditional, guided_behavior(conditional, now, then), Correction())
    torch.testing.assert_close(ratio, torch.tensor([2.0, 0.25, 0.0]))  # top-k now leaves the last token out
    torch.testing.assert_close(slope(ratio, conditional), torch.tensor([2.0, 0.25, 0.0]))
    for correction in KINDS:
        assert torch.isfinite(corrected_ratio(conditional, guided_behavior(conditional, now, then), correction)).all()


def stage_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities (with gradient), of the reference, at sampling; advantages; similarities: N=2, G=4, T=6."""
    logp = (random(0, 2, 4, 6) - 3).requires_grad_()
    then = logp.detach() + random(1, 2, 4, 6)
    return logp, logp.detach() + 0.1 * random(2, 2, 4, 6), then, random(3, 2, 4), random(4, 2, 4, 6).tanh()


def test_without_a_correction_the_loss_is_what_it_was_bit_for_bit() -> None:
    logp, reference, then, advantages, similarity = stage_case()
    weights = token_weights(logp.detach(), similarity)
    policy = -(weights.policy * (advantages.unsqueeze(-1) * torch.exp(logp - then))).sum()
    expected = policy + BETA * (weights.kl * k3_kl(logp, reference)).sum()
    found = stage_loss(logp, reference, then, advantages, similarity, beta=BETA).loss
    assert torch.equal(found, expected)
    assert torch.equal(slope(found, logp), slope(expected, logp))


@pytest.mark.parametrize("correction", [TRUNCATE, MASK])
@pytest.mark.parametrize("size", [1, 3])
def test_corrected_micro_batches_add_up_to_the_whole(correction: Correction, size: int) -> None:
    logp, reference, then, advantages, similarity = stage_case()
    whole = stage_loss(logp, reference, then, advantages, similarity, beta=BETA, correction=correction)
    weights = token_weights(logp.detach(), similarity)
    flat = [t.flatten(0, 1) for t in (logp, reference, then, advantages, weights.policy, weights.kl)]
    parts = []
    for rows in torch.arange(8).split(size):
        now, fixed, recorded, advantage, share, kl = (tensor[rows] for tensor in flat)
        share_of = TokenWeights(share, kl)
        parts.append(weighted_loss(now, fixed, recorded, advantage, share_of, beta=BETA, correction=correction))
    torch.testing.assert_close(sum(part.policy for part in parts), whole.policy)
    torch.testing.assert_close(sum(part.kl for part in parts), whole.kl)
    torch.testing.assert_close(slope(sum(part.loss for part in parts), logp), slope(whole.loss, logp))


def test_a_masked_token_has_its_kl_left_and_the_others_are_not_blown_up_for_it() -> None:
    logp, reference, then, advantages, similarity = stage_case()
    masked = beyond(logp, then, MASK)
    assert masked.any() and not masked.all()
    plain = stage_loss(logp, reference, then, advantages, similarity, beta=BETA)
    found = stage_loss(logp, reference, then, advantages, similarity, beta=BETA, correction=MASK)
    kl = BETA * (token_weights(logp.detach(), similarity).kl * k3_kl(logp, reference)).sum()
    torch.testing.assert_close(slope(found.loss, logp)[masked], slope(kl, logp)[masked])
    torch.testing.assert_close(slope(found.loss, logp)[~masked], slope(plain.loss, logp)[~masked])
    assert torch.equal(found.kl, plain.kl)


def test_the_policy_loss_alone_takes_the_same_correction() -> None:
    logp, reference, then, advantages, _ = stage_case()
    whole = stage_loss(logp, reference, then, advantages, None, beta=0.0, correction=TRUNCATE)
    torch.testing.assert_close(policy_loss(logp, then, advantages, correction=TRUNCATE), whole.loss)


@pytest.mark.parametrize(
    ("weights", "size"),
    [
        ([], 1.0),
        ([0.3], 1.0),
        ([2.0, 2.0, 2.0], 1.0),
        ([0.0, 0.0, 5.0, 0.0], 0.25),
        ([1.0, 3.0], 0.8),
        ([0.0, 0.0], 0.0),
        ([1e30, 1e30], 1.0),
    ],
)
def test_the_effective_sample_size_by_hand(weights: list[float], size: float) -> None:
    assert effective_sample_size(torch.tensor(weights)).item() == pytest.approx(size)


@pytest.mark.parametrize("wrong", [{"low": 1.0}, {"low": -0.1}, {"high": 1.0}, {"cap": 0.9}, {"cap": math.nan}])
def test_a_correction_that_would_touch_fresh_tokens_cannot_be_made(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="low < 1 < high and cap >= 1"):
        Correction("mask", **wrong)


@pytest.mark.parametrize("wrong", [{"ratio_range": (0.5, 1.0)}, {"ratio_range": (1.1, 2.0)}, {"ratio_cap": 0.5}])
def test_nor_be_configured(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        AlgorithmConfig.model_validate(wrong)
