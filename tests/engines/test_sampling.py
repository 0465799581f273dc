"""What is drawn from logits: guidance, temperature, top-k, top-p, and noise that only (seed, position, id) decides."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from stage_ray.engines.sampling import gumbel, sample, uniform
from stage_ray.samplers import SamplingParams, keep_top_k, keep_top_p, process_logits

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 1.0]])
OTHER = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0]])


def seeds(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int64)


def splitmix64(state: int) -> int:
    """The published finaliser on unsigned Python integers."""
    state &= 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return state ^ (state >> 31)


def test_the_noise_is_splitmix64_of_seed_position_and_token_id() -> None:
    golden = 0x9E3779B97F4A7C15
    seed, position = 2**63 - 1, 575
    found = uniform(torch.tensor([seed]), torch.tensor([position]), 100)[0]
    key = splitmix64(splitmix64(seed) + position * golden)
    expected = [((splitmix64(key + (v + 1) * golden) >> 32) + 0.5) * 2.0**-32 for v in range(100)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_the_noise_is_uniform_over_seeds_over_positions_and_over_token_ids() -> None:
    columns = {
        "seeds": uniform(seeds(20000), torch.zeros(20000, dtype=torch.int64), 1)[:, 0],
        "positions": uniform(torch.full((20000,), 7), seeds(20000), 1)[:, 0],
        "ids": uniform(torch.tensor([7]), torch.tensor([3]), 20000)[0],
    }
    for name, values in columns.items():
        counts = torch.histc(values, bins=64, min=0, max=1)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4, name
        neighbours = torch.corrcoef(torch.stack((values[:-1], values[1:])))[0, 1]
        assert abs(float(neighbours)) < 0.03, name


def test_noise_depends_on_nothing_but_its_own_seed_and_position() -> None:
    batch = gumbel(torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3]), 33)
    assert torch.equal(gumbel(torch.tensor([6]), torch.tensor([2]), 33)[0], batch[1])
    assert torch.isfinite(batch).all()


def test_tokens_follow_the_softmax_of_their_logits() -> None:
    count = 20000
    logits = torch.tensor([1.5, 0.0, -0.5, 0.7])
    drawn = sample(
        logits.expand(count, -1), None, seeds(count), torch.zeros(count, dtype=torch.int64), SamplingParams()
    )
    counts = torch.bincount(drawn.tokens, minlength=4)
    expected = logits.double().softmax(0) * count
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-4


def test_guidance_moves_from_the_unconditional_through_the_conditional_logits() -> None:
    guided = process_logits(LOGITS, OTHER, SamplingParams(guidance_scale=5.0))
    torch.testing.assert_close(guided, OTHER + 5 * (LOGITS - OTHER))


def test_without_guidance_the_unconditional_branch_is_not_needed_and_with_it_it_is() -> None:
    assert torch.equal(process_logits(LOGITS, None, SamplingParams()), LOGITS)
    with pytest.raises(ValueError, match="needs unconditional logits"):
        process_logits(LOGITS, None, SamplingParams(guidance_scale=2.0))


def test_temperature_divides_after_guidance() -> None:
    found = process_logits(LOGITS, OTHER, SamplingParams(guidance_scale=3.0, temperature=2.0))
    torch.testing.assert_close(found, (OTHER + 3 * (LOGITS - OTHER)) / 2)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert torch.isfinite(keep_top_k(LOGITS, 2)).tolist() == [[True, True, False, False], [False, False, True, True]]
    assert torch.equal(process_logits(LOGITS, None, SamplingParams(top_k=10)), LOGITS)


def test_top_p_keeps_the_smallest_set_with_that_mass_and_never_nothing() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert torch.isfinite(keep_top_p(logits, 0.75)).tolist() == [[True, True, False, False]]
    assert torch.isfinite(keep_top_p(logits, 0.82)).tolist() == [[True, True, True, False]]
    assert torch.isfinite(keep_top_p(logits, 1e-6)).tolist() == [[True, False, False, False]]


def test_the_guided_log_probability_is_that_of_the_distribution_drawn_from() -> None:
    params = SamplingParams(guidance_scale=2.0, temperature=0.7, top_k=3, top_p=0.9)
    drawn = sample(LOGITS, OTHER, seeds(2), seeds(2), params)
    expected = process_logits(LOGITS, OTHER, params).log_softmax(-1).gather(-1, drawn.tokens[:, None])[:, 0]
    torch.testing.assert_close(drawn.guided_logprobs, expected)
    torch.testing.assert_close(drawn.logprobs, LOGITS.log_softmax(-1).gather(-1, drawn.tokens[:, None])[:, 0])
    torch.testing.assert_close(drawn.entropy, torch.distributions.Categorical(logits=LOGITS).entropy())
    probabilities = process_logits(LOGITS, OTHER, params).softmax(-1)  # zeros where top-k and top-p cut
    torch.testing.assert_close(drawn.guided_entropy, torch.special.entr(probabilities).sum(-1))


def test_the_one_token_that_top_k_leaves_is_drawn_whatever_the_noise() -> None:
    count = 5000
    params = SamplingParams(top_k=1)
    drawn = sample(LOGITS[:1].expand(count, -1), None, seeds(count), seeds(count), params)
    assert drawn.tokens.eq(0).all() and drawn.guided_logprobs.eq(0).all()
