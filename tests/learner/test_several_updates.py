"""Several optimizer steps on one batch: ratios against the policy before the first, one version, bounded or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stage_ray.errors import ConfigError
from stage_ray.learner.batch import LearnerError
from stage_ray.learner.learner import Learner
from stage_ray.policies import load_policy
from stage_ray.recipes import load_recipe
from stage_ray.records import RolloutGroup
from tests.learner_case import PROMPTS, sample_groups, score, tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")
CLIP = {"clip": 0.2, "correction": "none"}


@pytest.fixture(scope="module")
def groups(model: Path) -> list[RolloutGroup]:
    return sample_groups(Learner(tiny_run(model)).policy, PROMPTS, group_size=4)


def trained(model: Path, groups: list[RolloutGroup], **sections: Any) -> tuple[Learner, dict[str, float]]:
    learner = Learner(tiny_run(model, **sections))
    return learner, learner.update(groups, score(groups))


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.weights()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_two_updates_are_those_of_a_loop_with_the_ratios_of_ppo(model: Path, groups: list[RolloutGroup]) -> None:
    run = tiny_run(model, recipe="grpo", algorithm={"beta": 0.0, **CLIP}, learner={"updates_per_batch": 2, "lr": 3e-3})
    learner = Learner(run)
    learner.update(groups, score(groups))

    policy = load_policy(run.policy, device=torch.device("cpu"))
    prompts = [policy.codec.encode_prompt(group.prompt.text).conditional for group in groups for _ in group.tokens]
    tokens = torch.cat([torch.from_numpy(group.tokens).long() for group in groups])
    rewards = torch.cat([torch.from_numpy(one.scores) for one in score(groups)]).view(len(groups), -1)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (
        rewards.std(1, keepdim=True) + run.algorithm.advantage_eps
    )
    before = policy.token_logprobs(prompts, tokens).logprobs.detach()
    parameters = list(policy.trained_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=run.learner.betas, weight_decay=0.0)
    for _ in range(2):
        ratio = (policy.token_logprobs(prompts, tokens).logprobs - before).exp()
        A = advantages.flatten()[:, None]
        loss = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, run.learner.max_grad_norm)
        optimizer.step()
    expected = {name: parameter.detach() for name, parameter in policy.trained_parameters().items()}
    moved = largest_difference(weights(Learner(run)), expected)
    assert largest_difference(weights(learner), expected) < 0.02 * moved


def test_a_batch_makes_one_version_and_its_metrics_are_those_before_the_first_step(
    model: Path, groups: list[RolloutGroup]
) -> None:
    steps = {"updates_per_batch": 2, "groups_per_update": 1}
    learner, metrics = trained(model, groups, algorithm=CLIP, learner=steps)
    single, alone = trained(model, groups, algorithm=CLIP)
    assert learner.version == single.version == 1
    assert {int(state["step"]) for state in learner._optimizer.state.values()} == {6}
    for name in ("kl", "reward/mean", "mismatch/abs_logprob", "advantage/mean_abs", "lr", "ratio/mean"):
        assert metrics[name] == pytest.approx(alone[name], abs=1e-6), name
    assert metrics.keys() == alone.keys()


def test_any_cut_into_micro_batches_is_the_same_update(model: Path, groups: list[RolloutGroup]) -> None:
    steps = {"updates_per_batch": 2, "groups_per_update": 1}
    narrow, _ = trained(model, groups, algorithm=CLIP, learner={**steps, "micro_batch_images": 3})
    wide, _ = trained(model, groups, algorithm=CLIP, learner=steps)
    moved = largest_difference(weights(wide), weights(Learner(tiny_run(model))))
    assert largest_difference(weights(narrow), weights(wide)) < 0.05 * moved


def test_pcpo_is_grpo_at_the_first_update_and_not_at_the_second(model: Path, groups: list[RolloutGroup]) -> None:
    def after(recipe: str, updates: int) -> dict[str, Tensor]:
        options = {"beta": 0.01} | ({"xi": 1e-4} if recipe == "pcpo" else CLIP)
        learner, _ = trained(
            model, groups, recipe=recipe, algorithm=options, learner={"updates_per_batch": updates, "lr": 3e-3}
        )
        return weights(learner)

    first, second = (largest_difference(after("grpo", updates), after("pcpo", updates)) for updates in (1, 2))
    assert first < 1e-6 < 1e-4 < second


def test_a_later_mini_batch_that_is_not_finite_is_left_out(
    model: Path, groups: list[RolloutGroup], caplog: pytest.LogCaptureFixture
) -> None:
    learner, calls = Learner(tiny_run(model, algorithm=CLIP, learner={"updates_per_batch": 2})), []
    run_policy = learner._passes.policy

    def second_is_infinite(*given: Any) -> Any:
        outputs = run_policy(*given)
        calls.append(outputs)
        if len(calls) == 2:
            outputs.sums["loss"] = float("inf")
        return outputs

    learner._passes.policy = second_is_infinite  # type: ignore[method-assign]
    learner.update(groups, score(groups))
    once, _ = trained(model, groups, algorithm=CLIP)
    assert largest_difference(weights(learner), weights(once)) < 1e-6 and learner.version == 1
    assert "mini-batch 2 is left out" in caplog.text


def test_a_first_one_that_is_not_finite_changes_nothing(model: Path, groups: list[RolloutGroup]) -> None:
    learner = Learner(tiny_run(model, algorithm=CLIP, learner={"updates_per_batch": 2}))
    before, run_reference = weights(learner), learner._passes.reference

    def broken(*given: Any) -> Any:
        reference = run_reference(*given)
        reference.logprobs.fill_(torch.nan)
        return reference

    learner._passes.reference = broken  # type: ignore[method-assign]
    with pytest.raises(LearnerError, match="no group of the batch is finite"):
        learner.update(groups, score(groups))
    assert largest_difference(weights(learner), before) == 0 and learner.version == 0


@pytest.mark.parametrize("steps", [{"updates_per_batch": 2}, {"groups_per_update": 4}])
def test_several_updates_need_a_bound(steps: dict[str, int]) -> None:
    (name, value), unused = next(iter(steps.items())), Path("unused")
    with pytest.raises(ConfigError, match=rf"learner.{name} = {value} moves .* set algorithm.clip=0.2, or recipe=pcpo"):
        load_recipe(tiny_run(unused, learner=steps))
    load_recipe(tiny_run(unused, learner=steps, algorithm=CLIP))
    load_recipe(tiny_run(unused, learner=steps, recipe="pcpo"))


@pytest.mark.parametrize(("groups", "ranks"), [(3, 1), (2, 4)])
def test_mini_batches_divide_a_batch_and_ranks_divide_them(groups: int, ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"learner.groups_per_update = {groups} must divide .* a multiple of learner"):
        tiny_run(Path("unused"), learner={"groups_per_update": groups, "ranks": ranks})
