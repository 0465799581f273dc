from __future__ import annotations

import torch

from stage_ray.algorithm import group_advantages
from stage_ray.algorithm.credit import stage_credit

BOOK = torch.eye(4)
TOKENS = torch.tensor([[[0, 1], [0, 2], [3, 1]]])
EVEN = torch.full((1, 3), 2.0)


def test_a_group_in_which_no_scorer_speaks_has_similarity_one_when_the_entropy_reward_is_off() -> None:
    advantages, similarity = stage_credit(torch.ones(1, 3, 2), EVEN, EVEN, TOKENS, BOOK, entropy_weight=0.0)
    assert torch.equal(advantages, torch.zeros(1, 3))
    assert torch.equal(similarity, torch.ones(1, 3, 2))


def test_a_scorer_of_weight_0_breaks_no_silence() -> None:
    watched = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]])
    weights = torch.tensor([1.0, 0.0])
    advantages, similarity = stage_credit(watched, EVEN, EVEN, TOKENS, BOOK, weights=weights, entropy_weight=0.0)
    assert torch.equal(advantages, torch.zeros(1, 3))
    assert torch.equal(similarity, torch.ones(1, 3, 2))


def test_in_such_a_group_the_entropy_alone_decides_when_its_reward_is_on() -> None:
    policy = torch.tensor([[2.0, 3.0, 2.0]])
    advantages, similarity = stage_credit(torch.ones(1, 3, 1), policy, EVEN, TOKENS, BOOK, entropy_weight=0.4)
    assert advantages[0, 0] == advantages[0, 2] > 0 > advantages[0, 1]
    assert advantages.std().item() > 0.99  # normalised to unit scale, however small the reward was
    assert not torch.equal(similarity, torch.ones(1, 3, 2))


def test_the_entropy_reward_comes_with_its_weight_on_top_of_the_scores() -> None:
    scores = torch.tensor([[[1.0], [1.0], [0.0]]])
    policy = torch.tensor([[2.0, 3.0, 2.0]])
    advantages, _ = stage_credit(scores, policy, EVEN, TOKENS, BOOK, entropy_weight=0.4)
    torch.testing.assert_close(advantages, group_advantages(torch.tensor([[1.1, 0.9, 0.0]])))


def test_a_silent_group_beside_a_telling_one_changes_nothing_in_it() -> None:
    telling = torch.tensor([[[1.0], [0.0], [0.0]]])
    both = torch.cat([telling, torch.ones(1, 3, 1)])
    alone = stage_credit(telling, EVEN, EVEN, TOKENS, BOOK, entropy_weight=0.0)
    beside = stage_credit(both, EVEN.repeat(2, 1), EVEN.repeat(2, 1), TOKENS.repeat(2, 1, 1), BOOK, entropy_weight=0.0)
    for values, expected in zip(beside, alone, strict=True):
        torch.testing.assert_close(values[:1], expected)
    assert torch.equal(beside[1][1], torch.ones(3, 2))
