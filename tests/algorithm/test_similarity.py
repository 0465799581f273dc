from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage_ray.algorithm import advantage_weight, kl_weight, opposite_sign_similarity

BOOK = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0], [-3.0, 0.0]])  # cosines 0-1: 0.6, 0-2: 0, 1-2: 0.8, 0-3: -1


def similarity(tokens: list[int], advantages: list[float]) -> list[float]:
    """One group, one place."""
    out = opposite_sign_similarity(torch.tensor([tokens]).unsqueeze(-1), BOOK, torch.tensor([advantages]))
    return [round(value, 5) for value in out.flatten().tolist()]


def test_only_oppositely_rewarded_peers_are_compared() -> None:
    # 0 meets 1 and 2: (0.6 + 0) / 2; 1 and 2 meet 0 alone
    assert similarity([0, 1, 2], [1.0, -0.5, -0.5]) == [0.3, 0.6, 0.0]


def test_the_length_of_a_codebook_vector_does_not_matter() -> None:
    assert similarity([1, 2], [1.0, -1.0]) == [0.8, 0.8]
    assert similarity([0, 3], [1.0, -1.0]) == [-1.0, -1.0]


def test_an_image_with_advantage_zero_is_compared_with_all_and_its_own_place_counts_as_zero() -> None:
    # the third meets 0, 1 and itself: (0 + 0.8 + 0) / 3; the others meet each other and the third
    assert similarity([0, 1, 2], [1.0, -1.0, 0.0]) == [0.3, 0.7, 0.26667]


def test_a_group_without_advantages_compares_all_pairs_over_all_g() -> None:
    assert similarity([0, 0, 0, 0], [0.0] * 4) == [0.75] * 4


def test_an_image_without_opposite_peers_has_similarity_zero() -> None:
    assert similarity([0, 0], [1.0, 2.0]) == [0.0, 0.0]


def test_the_sign_counts_even_where_the_product_of_advantages_underflows() -> None:
    assert similarity([0, 0], [1e-30, 1e-30]) == [0.0, 0.0]


def test_places_do_not_see_each_other_nor_do_groups() -> None:
    tokens = torch.tensor([[[0, 1], [0, 2]], [[3, 3], [0, 3]]])
    out = opposite_sign_similarity(tokens, BOOK, torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    torch.testing.assert_close(out[:, 0], torch.tensor([[1.0, 0.8], [-1.0, 1.0]]))


def test_a_zero_vector_is_like_nothing() -> None:
    out = opposite_sign_similarity(torch.tensor([[[0], [1]]]), torch.zeros(2, 3), torch.tensor([[1.0, -1.0]]))
    assert torch.equal(out, torch.zeros(1, 2, 1))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, G, T\]"):
        opposite_sign_similarity(torch.zeros(1, 2, 3, dtype=torch.long), BOOK, torch.zeros(1, 3))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 6), st.floats(0.1, 10))
def test_similarity_is_bounded_and_blind_to_the_scale_of_codebook_and_advantages(seed: int, G: int, by: float) -> None:
    g = torch.Generator().manual_seed(seed)
    tokens, book = torch.randint(0, 7, (2, G, 3), generator=g), torch.randn(7, 4, generator=g)
    advantages = torch.randn(2, G, generator=g)
    out = opposite_sign_similarity(tokens, book, advantages)
    assert out.abs().max() <= 1.0
    torch.testing.assert_close(out, opposite_sign_similarity(tokens, book * by, advantages * by), atol=1e-5, rtol=1e-5)
    shuffle = torch.randperm(G, generator=g)
    shuffled = opposite_sign_similarity(tokens[:, shuffle], book, advantages[:, shuffle])
    torch.testing.assert_close(out[:, shuffle], shuffled, atol=1e-5, rtol=1e-5)


def test_weights_at_the_ends_and_in_the_middle() -> None:
    s = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.6, 1.0, 1.5])
    torch.testing.assert_close(advantage_weight(s), torch.tensor([1.0, 1.0, 0.75, 0.5, 0.2, 0.0, 0.0]))
    torch.testing.assert_close(kl_weight(s), torch.tensor([0.5, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]))
