from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage_ray.algorithm import combine_rewards, group_advantages

SCORES = torch.tensor([[[1.0, 0.2], [0.0, 0.2]], [[0.5, 0.2], [0.5, 0.4]]])


def test_advantages_use_the_unbiased_standard_deviation_of_the_group() -> None:
    # mean 1, deviations -1, 0, 1; unbiased variance (1 + 0 + 1) / 2 = 1
    out = group_advantages(torch.tensor([[0.0, 1.0, 2.0]]))
    torch.testing.assert_close(out, torch.tensor([[-1.0, 0.0, 1.0]]) / 1.0001)


def test_groups_do_not_see_each_other() -> None:
    both = group_advantages(torch.tensor([[0.0, 1.0], [100.0, 300.0]]))
    torch.testing.assert_close(both[0], group_advantages(torch.tensor([[0.0, 1.0]]))[0])


def test_a_group_without_variance_gets_exactly_zero_whatever_its_mean_rounds_to() -> None:
    rewards = torch.full((1, 7), 0.1)
    assert (rewards.sum() / 7 - 0.1).abs() < 1e-6
    assert torch.equal(group_advantages(rewards), torch.zeros(1, 7))


def test_a_group_of_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        group_advantages(torch.zeros(3, 1))


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(0.5, 10), st.floats(-5, 5))
def test_advantages_are_centred_and_blind_to_shift_and_scale(values: list[float], scale: float, shift: float) -> None:
    rewards = torch.tensor([values], dtype=torch.float64)
    out = group_advantages(rewards, eps=1e-12)
    if rewards.std() > 1e-3:  # below, the rounding of the mean is what is normalised
        assert out.sum().abs() < 1e-6
        torch.testing.assert_close(out, group_advantages(rewards * scale + shift, eps=1e-12), atol=1e-6, rtol=1e-6)


def test_scorers_are_summed_with_their_weights() -> None:
    out = combine_rewards(SCORES, weights=torch.tensor([2.0, 10.0]))
    torch.testing.assert_close(out, torch.tensor([[4.0, 2.0], [3.0, 5.0]]))


def test_without_weights_every_scorer_counts_one() -> None:
    torch.testing.assert_close(combine_rewards(SCORES), torch.tensor([[1.2, 0.2], [0.7, 0.9]]))


def test_a_constant_scorer_is_dropped_in_the_groups_where_it_is_constant() -> None:
    out = combine_rewards(SCORES, drop_constant=True)
    torch.testing.assert_close(out, torch.tensor([[1.0, 0.0], [0.2, 0.4]]))


def test_a_group_in_which_every_scorer_is_constant_gets_zero() -> None:
    out = combine_rewards(torch.full((1, 4, 2), 0.7), drop_constant=True)
    assert torch.equal(out, torch.zeros(1, 4))


def test_rounding_does_not_make_a_constant_scorer_count() -> None:
    scores = torch.tensor([[[0.7], [0.7 + 5e-7]]])
    assert torch.equal(combine_rewards(scores, drop_constant=True), torch.zeros(1, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_never_summed(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        combine_rewards(torch.tensor([[[bad], [0.0]]]))


def test_weights_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one a scorer"):
        combine_rewards(SCORES, weights=torch.ones(3))
