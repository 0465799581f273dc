from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage_ray.algorithm import entropy_reward

values = st.lists(st.floats(0, 8), min_size=4, max_size=4)


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def test_the_best_images_are_ordered_by_how_near_their_entropy_is_to_the_references() -> None:
    # e = 1, 1/2, 1/5 on the best three, mean 17/30; the loser gets nothing though its entropy is exact
    out = entropy_reward(row(2.0, 3.0, 4.0, 2.0), row(2.0, 2.0, 2.0, 2.0), row(1.0, 1.0, 1.0, 0.0))
    torch.testing.assert_close(out, row(1 - 17 / 30, 1 / 2 - 17 / 30, 1 / 5 - 17 / 30, 0.0))


def test_entropy_above_and_below_the_reference_cost_the_same() -> None:
    out = entropy_reward(row(1.0, 3.0, 2.0), row(2.0, 2.0, 2.0), row(1.0, 1.0, 1.0))
    assert out[0, 0] == out[0, 1] < out[0, 2]


def test_a_single_best_image_gets_nothing() -> None:
    assert torch.equal(entropy_reward(row(5.0, 1.0), row(1.0, 1.0), row(1.0, 0.0)), row(0.0, 0.0))


def test_in_a_group_without_variance_every_image_is_a_best_one() -> None:
    out = entropy_reward(row(2.0, 3.0), row(2.0, 2.0), row(0.0, 0.0))
    torch.testing.assert_close(out, row(0.25, -0.25))


def test_it_can_be_given_to_all_images() -> None:
    out = entropy_reward(row(2.0, 3.0), row(2.0, 2.0), row(1.0, 0.0), best_only=False)
    torch.testing.assert_close(out, row(0.25, -0.25))


def test_no_gradient_flows_through_the_entropies() -> None:
    entropy = row(2.0, 3.0).requires_grad_()
    assert not entropy_reward(entropy, row(2.0, 2.0), row(0.0, 0.0)).requires_grad


@settings(deadline=None)
@given(values, values, st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4), st.booleans())
def test_it_sums_to_zero_in_every_group_and_stays_within_one(
    policy: list[float], reference: list[float], rewards: list[float], best_only: bool
) -> None:
    out = entropy_reward(row(*policy), row(*reference), row(*rewards), best_only=best_only)
    assert out.sum().abs() < 1e-12
    assert out.abs().max() <= 1.0
    if best_only:
        assert (out[row(*rewards) < max(rewards)] == 0).all()


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, G\]"):
        entropy_reward(row(1.0), row(1.0, 2.0), row(1.0, 2.0))
