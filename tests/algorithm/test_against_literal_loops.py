"""The vectorised update equals the published step written out in loops, value by value and gradient by gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage_ray.algorithm import stage_loss
from stage_ray.algorithm.credit import stage_credit
from tests.algorithm.literal_stage import literal_step

SWITCHES = list(itertools.product([True, False], repeat=3))


def batch(seed: int, N: int = 3, G: int = 4, T: int = 5, R: int = 2, V: int = 6, D: int = 3) -> dict[str, torch.Tensor]:
    """Random groups in float64; scores of few levels, so that ties, constant scorers and empty groups occur."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (N, G, R), generator=g).double() / 2
    scores[0, :, 0] = 0.5  # one constant scorer
    scores[1] = 1.0  # one group in which no scorer says anything
    return {
        "scores": scores,
        "h": torch.rand(N, G, generator=g, dtype=torch.float64) * 3,
        "h_ref": torch.rand(N, G, generator=g, dtype=torch.float64) * 3,
        "tokens": torch.randint(0, V, (N, G, T), generator=g),
        "codebook": torch.randn(V, D, generator=g, dtype=torch.float64),
        "logp": -torch.rand(N, G, T, generator=g, dtype=torch.float64) * 4,
        "logp_ref": -torch.rand(N, G, T, generator=g, dtype=torch.float64) * 4,
    }


@pytest.mark.parametrize(("reweight_advantage", "reweight_kl", "entropy"), SWITCHES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_vectorised_step_equals_the_published_step_in_loops(
    reweight_advantage: bool, reweight_kl: bool, entropy: bool, seed: int
) -> None:
    data, weights, beta = batch(seed), torch.tensor([1.0, 0.5], dtype=torch.float64), 0.03
    entropy_weight = 0.4 if entropy else 0.0
    advantages, similarities = stage_credit(
        data["scores"], data["h"], data["h_ref"], data["tokens"], data["codebook"],
        weights=weights, drop_constant=True, entropy_weight=entropy_weight,
    )  # fmt: skip
    logp = data["logp"].clone().requires_grad_()
    similarity = similarities if reweight_advantage or reweight_kl else None
    switches = {"reweight_advantage": reweight_advantage, "reweight_kl": reweight_kl}
    loss = stage_loss(logp, data["logp_ref"], None, advantages, similarity, beta=beta, **switches)
    loss.loss.backward()
    literal = [
        literal_step(
            *(data[name][n].tolist() for name in ("scores", "h", "h_ref", "tokens")),
            data["codebook"].tolist(),
            data["logp"][n].tolist(),
            data["logp_ref"][n].tolist(),
            weights=weights.tolist(),
            drop_constant=True,
            entropy_weight=entropy_weight,
            beta=beta,
            **switches,
        )
        for n in range(3)
    ]
    torch.testing.assert_close(advantages, torch.tensor([step.advantages for step in literal]).double())
    torch.testing.assert_close(similarities, torch.tensor([step.similarity for step in literal]).double())
    torch.testing.assert_close(loss.loss.item(), sum(step.loss for step in literal) / 3)
    torch.testing.assert_close(loss.policy.item(), sum(step.policy for step in literal) / 3)
    torch.testing.assert_close(loss.kl.item(), sum(step.kl for step in literal) / 3)
    torch.testing.assert_close(logp.grad, torch.tensor([step.gradient for step in literal]).double() / 3)
