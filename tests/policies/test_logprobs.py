"""Statistics from states and a head, in pieces, are those of the logits made at once; so are their gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stage_ray import samplers
from stage_ray.algorithm.divergence import Divergence, exact_divergence
from stage_ray.config import PolicyConfig
from stage_ray.policies import load_policy, logprobs
from stage_ray.policies.janus import JanusPolicy
from stage_ray.policies.logprobs import chunked_divergence, chunked_logprobs, token_logprobs
from stage_ray.samplers import SamplingParams, TokenRule, process_logits
from stage_ray.samplers.entropy_informed import EntropyInformedRule
from stage_ray.samplers.guided import GuidedRule
from tests.tiny import CODES, IMAGE_TOKENS, tiny_janus

B, T, HIDDEN, V = 3, 7, 16, 33
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class SmallHead(nn.Module):
    """Two layers and an activation, as Janus's; the last ids are impossible. Notes how many rows it was given."""

    def __init__(self, impossible: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, V))
        self.impossible = impossible
        self.rows: list[int] = []

    def forward(self, states: Tensor) -> Tensor:
        self.rows.append(len(states))
        logits = 3 * self.layers(states)
        return logits.masked_fill(torch.arange(V) >= V - self.impossible, -torch.inf)


def frozen(impossible: int = 0) -> SmallHead:
    head = SmallHead(impossible)
    head.requires_grad_(False)
    return head


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """States (with gradient), tokens, and what the loss multiplies each token's numbers with."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(B, T, HIDDEN, generator=generator).to(dtype).requires_grad_()
    tokens = torch.randint(0, V, (B, T), generator=generator)
    return states, tokens, torch.randn(B, T, generator=generator)


def plain(states: Tensor, tokens: Tensor, head: nn.Module) -> logprobs.TokenLogprobs:
    return token_logprobs(head(states.float()), tokens)


@pytest.mark.parametrize("impossible", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 7, B * T, 1000])
def test_values_and_the_states_gradient_are_the_plain_ones(
    rows: int, dtype: torch.dtype, impossible: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CACHED", 3 * V)  # pieces of 3 rows, the last one shorter
    states, tokens, weight = case(dtype)
    head = frozen(impossible)
    found, expected = chunked_logprobs(states, tokens, head, rows=rows), plain(states, tokens, head)
    torch.testing.assert_close(found.logprobs, expected.logprobs, **CLOSE)
    torch.testing.assert_close(found.entropy, expected.entropy, **CLOSE)
    assert (found.logprobs == -torch.inf).any() == (impossible > 0)
    got, want = (torch.autograd.grad(each.logprobs, states, weight)[0] for each in (found, expected))
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, **(CLOSE if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}))


@pytest.mark.parametrize("rows", [4, 1000])
def test_the_entropys_gradient_is_there_for_the_asking(rows: int) -> None:
    states, tokens, weight = case()
    head = frozen(impossible=2)
    assert not chunked_logprobs(states, tokens, head).entropy.requires_grad
    found, expected = chunked_logprobs(states, tokens, head, rows=rows, entropy_grad=True), plain(states, tokens, head)
    for name in ("logprobs", "entropy"):
        got, want = (torch.autograd.grad(getattr(each, name), states, weight, True)[0] for each in (found, expected))
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("wrap", [lambda head: head, lambda head: lambda states: head(states)])
def test_a_head_that_is_trained_gets_its_gradients_whether_module_or_function(
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]],
) -> None:
    states, tokens, weight = case()
    head = SmallHead()
    wanted = [states, *head.parameters()]
    found, expected = chunked_logprobs(states, tokens, wrap(head), rows=4), plain(states, tokens, head)
    assert not found.entropy.requires_grad
    got, want = (torch.autograd.grad(each.logprobs, wanted, weight) for each in (found, expected))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_a_frozen_head_runs_once_a_chunk_and_never_on_more() -> None:
    states, tokens, weight = case()
    head = frozen()
    found = chunked_logprobs(states, tokens, head, rows=8)
    found.logprobs.backward(weight)
    assert head.rows == [1, 8, 8, 5]  # the first asks whether the head itself wants a gradient


def test_numbers_are_the_same_bits_with_and_without_gradient() -> None:
    states, tokens, _ = case()
    for head in (frozen(), SmallHead()):
        trained = chunked_logprobs(states, tokens, head, rows=8)
        with torch.no_grad():
            measured = chunked_logprobs(states, tokens, head, rows=8)
        assert torch.equal(trained.logprobs, measured.logprobs) and torch.equal(trained.entropy, measured.entropy)


@pytest.mark.parametrize("trained", [False, True])
def test_the_head_and_its_gradient_stay_in_float32_under_autocast(trained: bool) -> None:
    states, tokens, weight = case()
    head = SmallHead() if trained else frozen()
    expected = chunked_logprobs(states, tokens, head, rows=8).logprobs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked_logprobs(states, tokens, head, rows=8).logprobs
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, states, weight)[0], torch.autograd.grad(expected, states, weight)[0])


def test_a_head_may_take_several_states_a_token() -> None:
    states, tokens, weight = case()
    head, pairs = frozen(), torch.stack((states, states.flip(0)), dim=2)  # [B, T, 2, hidden]
    found = chunked_logprobs(pairs, tokens, lambda rows: head(rows[:, 0]) - head(rows[:, 1]), rows=4)
    expected = token_logprobs(head(states) - head(states.flip(0)), tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, **CLOSE)
    got, want = (torch.autograd.grad(each.logprobs, states, weight, True)[0] for each in (found, expected))
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("kind", ["policy_reference", "reference_policy", "jensen_shannon"])
def test_a_divergence_in_pieces_is_that_of_all_logits_at_once(kind: Divergence) -> None:
    (states, _, weight), head, other = case(), frozen(impossible=2), frozen(impossible=2)
    theirs = states.detach() + 0.3 * torch.randn(states.shape, generator=torch.Generator().manual_seed(5))
    found = chunked_divergence(states, theirs, (head, other), kind, rows=4)
    logp, logq = (each.layers(part) * 3 for each, part in ((head, states), (other, theirs)))
    expected = exact_divergence(logp[..., :-2].log_softmax(-1), logq[..., :-2].log_softmax(-1).detach(), kind)
    torch.testing.assert_close(found, expected, **CLOSE)
    got, want = (torch.autograd.grad(each, states, weight)[0] for each in (found, expected))
    torch.testing.assert_close(got, want, **CLOSE)


def test_engines_and_learner_share_one_definition_of_what_is_drawn_from() -> None:
    assert samplers.process_logits is process_logits and samplers.SamplingParams is SamplingParams


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> JanusPolicy:
    path = tiny_janus(tmp_path_factory.mktemp("statistics") / "janus")
    policy = load_policy(PolicyConfig(path=str(path)), device=torch.device("cpu"))
    assert isinstance(policy, JanusPolicy)
    return policy


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(guidance_scale=3.0),
        SamplingParams(guidance_scale=3.0, temperature=0.8, top_k=20, top_p=0.95),
    ],
)
def test_guided_log_probabilities_are_those_that_the_engines_draw_from(
    policy: JanusPolicy, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage_ray.policies.base.LOGITS_AT_ONCE", 10 * CODES)
    texts = ("a photo of a red circle", "a photo of a square left of a triangle")
    prompts = [policy.codec.encode_prompt(text) for text in texts]
    tokens = torch.randint(0, CODES, (2, IMAGE_TOKENS), generator=torch.Generator().manual_seed(1))
    found = policy.guided_token_logprobs(prompts, tokens, params)
    assert found.guided_logprobs is not None and not found.guided_logprobs.requires_grad
    with torch.no_grad():
        conditional = policy.image_logits([prompt.conditional for prompt in prompts], tokens)
        unconditional = policy.image_logits([prompt.unconditional for prompt in prompts], tokens)
        expected = process_logits(conditional.flatten(0, 1), unconditional.flatten(0, 1), params).log_softmax(-1)
    chosen = expected.gather(-1, tokens.flatten().unsqueeze(-1)).view(tokens.shape)
    assert (chosen == -torch.inf).any() == (params.top_k > 0)
    torch.testing.assert_close(found.guided_logprobs, chosen, atol=1e-4, rtol=1e-4)
    plain = policy.token_logprobs([prompt.conditional for prompt in prompts], tokens)
    assert torch.equal(found.logprobs, plain.logprobs) and torch.equal(found.entropy, plain.entropy)
    assert found.logprobs.requires_grad and found.entropy.requires_grad


@pytest.mark.parametrize("rule", [GuidedRule(), EntropyInformedRule()])
def test_guided_log_probabilities_have_a_gradient_through_both_branches_for_the_asking(
    policy: JanusPolicy, monkeypatch: pytest.MonkeyPatch, rule: TokenRule
) -> None:
    monkeypatch.setattr("stage_ray.policies.base.LOGITS_AT_ONCE", 10 * CODES)
    params = SamplingParams(guidance_scale=3.0, temperature=0.8, rule=rule)
    prompt = policy.codec.encode_prompt("a photo of a red circle")
    tokens = torch.randint(0, CODES, (1, IMAGE_TOKENS), generator=torch.Generator().manual_seed(2))
    found = policy.guided_token_logprobs([prompt], tokens, params, entropy_grad=False, guided_grad=True)
    logits = [policy.image_logits([branch], tokens) for branch in (prompt.conditional, prompt.unconditional)]
    expected = process_logits(*logits, params).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert found.guided_logprobs is not None
    weights = list(policy.trained_parameters().values())
    got, want = (
        torch.autograd.grad(each.sum(), weights, allow_unused=True) for each in (found.guided_logprobs, expected)
    )
    for mine, theirs in zip(got, want, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_the_divergence_from_another_policy_is_over_its_whole_vocabulary(policy: JanusPolicy, tmp_path: Path) -> None:
    other = load_policy(PolicyConfig(path=str(tiny_janus(tmp_path / "other", seed=1))), device=torch.device("cpu"))
    prompts = [policy.codec.encode_prompt("a photo of a red circle").conditional]
    tokens = torch.randint(0, CODES, (1, IMAGE_TOKENS), generator=torch.Generator().manual_seed(3))
    found = policy.token_logprobs(prompts, tokens, divergence=(other, "jensen_shannon"))
    assert torch.equal(found.logprobs, policy.token_logprobs(prompts, tokens).logprobs)
    logp, logq = (each.image_logits(prompts, tokens).log_softmax(-1) for each in (policy, other))
    assert found.divergence is not None and found.divergence.requires_grad
    torch.testing.assert_close(found.divergence, exact_divergence(logp, logq, "jensen_shannon"), **CLOSE)
    assert found.divergence.min() > 0.001
