"""A group with a value that is not finite is left out of its update and counted; the others train as without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stage_ray.algorithm.losses import TokenWeights
from stage_ray.learner.batch import LearnerError
from stage_ray.learner.finite import NonFiniteError, blame, train_finite
from stage_ray.learner.learner import Learner
from stage_ray.learner.metrics import UpdateOutputs
from stage_ray.recipes.base import Credit, ReferenceOutputs
from tests.learner_case import PROMPTS, sample_groups, score, tiny_run
from tests.tiny import tiny_janus


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_janus(tmp_path_factory.mktemp("model") / "janus")


@pytest.fixture(scope="module")
def scored(model: Path) -> Any:
    groups = sample_groups(Learner(tiny_run(model)).policy, PROMPTS, group_size=4)
    return groups, score(groups)


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.weights()}


def learner_with(model: Path, shift: float, *group_ids: int, entropy: bool = False, **algorithm: Any) -> Learner:
    """A learner whose reference says of one token of some groups (or of its entropy) so much more than it should."""
    learner = Learner(tiny_run(model, algorithm=algorithm))
    pass_of_reference = learner._passes.reference

    def shifted(batch: Any, micro_batches: Any) -> Any:
        reference = pass_of_reference(batch, micro_batches)
        for place, group in enumerate(batch.groups):
            if group.group_id in group_ids:
                (reference.entropy if entropy else reference.logprobs)[place, 0, 0] += shift
        return reference

    learner._passes.reference = shifted  # type: ignore[method-assign]
    return learner


@pytest.mark.parametrize(
    ("shift", "entropy", "what"),
    [
        (95.0, False, "KL"),  # the loss is infinite
        (60.0, False, "KL"),  # the loss is finite and the gradient's norm is not
        (torch.nan, False, "the reference's log-probabilities"),
        (torch.nan, True, "the reference's entropy"),
    ],
)
def test_a_group_that_is_not_finite_is_left_out_and_the_others_train_as_without_it(
    model, scored, caplog, shift, entropy, what
):
    learner, healthy = learner_with(model, shift, 1, entropy=entropy), Learner(tiny_run(model))
    metrics = learner.update(*scored)
    expected = healthy.update(*([items[0], items[2]] for items in scored))
    assert metrics["groups/dropped"] == 1 and expected["groups/dropped"] == 0
    assert {name for name in expected if metrics[name] != expected[name]} <= {
        "groups/dropped",
        "time/reference_s",
        "time/policy_s",
    }
    assert all(torch.equal(tensor, weights(healthy)[name]) for name, tensor in weights(learner).items())
    assert f"left out: group 1 ({what})" in caplog.text and learner.version == 1


def test_a_batch_without_a_finite_group_stops_the_run_and_changes_nothing(model, scored):
    learner = learner_with(model, 95.0, 0, 1, 2)
    before = weights(learner)
    with pytest.raises(
        LearnerError, match=r"the loss is inf; .* algorithm.kl_ratio_cap: no group of the batch is finite"
    ):
        learner.update(*scored)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(learner).items())
    assert learner.version == 0


def test_with_a_cap_on_the_kl_a_token_far_off_stops_nothing_and_is_seen_in_the_metrics(model, scored):
    learner = learner_with(model, 30.0, 1, kl_ratio_cap=20.0)
    metrics = learner.update(*scored)
    assert metrics["groups/dropped"] == 0
    assert metrics["kl/max"] == pytest.approx(torch.tensor(30.0).expm1().item() - 30, rel=1e-4)
    assert metrics["kl/weighted"] < 20
    uncapped = learner_with(model, 30.0, 1).update(*scored)
    assert uncapped["kl/weighted"] > 1e6 and uncapped["grad_norm"] > 1e6 * metrics["grad_norm"]


def test_a_cap_that_no_token_reaches_changes_no_bit(model, scored):
    with_cap, without = learner_with(model, 2.0, 1, kl_ratio_cap=1e3), learner_with(model, 2.0, 1)
    with_cap.update(*scored), without.update(*scored)
    assert all(torch.equal(tensor, weights(without)[name]) for name, tensor in weights(with_cap).items())


def test_copies_that_keep_ranks_in_step_weigh_nothing(model, scored):
    groups, scores = scored
    padded, plain = Learner(tiny_run(model)), Learner(tiny_run(model))
    padded._train([*groups[:2], groups[0]], [*scores[:2], scores[0]], 1)
    plain.update(groups[:2], scores[:2])
    for name, tensor in weights(padded).items():
        torch.testing.assert_close(tensor, weights(plain)[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("what", ["log-probabilities", "advantages", "token weights", "importance ratios"])
def test_whatever_enters_the_loss_may_be_to_blame(model, what):
    run = tiny_run(model, algorithm={"correction": "none"})
    values = {name: torch.zeros(3, 2, 4) for name in ("log-probabilities", "token weights", "importance ratios")}
    values["advantages"] = torch.zeros(3, 2)
    # A ratio is taken against the behaviour: 100 nats less of that are a ratio beyond every float.
    values[what].view(3, -1)[1, 0] = -100.0 if what == "importance ratios" else torch.nan
    credit = Credit(values["advantages"], TokenWeights(values["token weights"], torch.zeros(3, 2, 4)))
    reference = ReferenceOutputs(torch.zeros(3, 2, 4), torch.zeros(3, 2, 4))
    outputs = UpdateOutputs(values["log-probabilities"], values["importance ratios"], {})
    assert blame(reference, credit, outputs, run) == {1: what}


def test_ranks_get_as_many_groups_each_whichever_are_left_out(scored):
    groups, scores = [replace(scored[0][0], group_id=n) for n in range(4)], list(range(4))
    seen = []

    def train(left: Any, judged: Any, copies: int) -> dict[str, float]:
        ids = [group.group_id for group in left]
        seen.append((ids, judged, copies))
        bad = {0: "KL"} if 0 in ids else {n: "KL" for n, group_id in enumerate(ids) if group_id == 2}
        if bad:
            raise NonFiniteError("the loss is inf", bad)
        return {}

    assert train_finite(train, groups, scores, 2) == {"groups/dropped": 2}  # type: ignore[arg-type]
    assert seen == [
        ([0, 1, 2, 3], [0, 1, 2, 3], 0),
        ([1, 2, 3, 1], [1, 2, 3, 1], 1),
        ([1, 3], [1, 3], 0),
    ]
