"""``algorithm.reference_refresh``: the reference becomes the policy of a step, and survives a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stage_ray.config import RunConfig
from stage_ray.learner.learner import Learner
from tests.learner.test_learner import same, snapshot, timeless
from tests.learner_case import tiny_run, train

pytestmark = pytest.mark.usefixtures("one_thread")


def refreshing(model: Path, *steps: int, **learner: Any) -> RunConfig:
    return tiny_run(model, steps=4, algorithm={"reference_refresh": [*steps]}, learner={"lr": 3e-3} | learner)


def reference(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner._reference.trained_parameters().items()}


def test_the_reference_of_a_listed_step_is_the_policy_after_it(model: Path) -> None:
    learner, plain = Learner(refreshing(model, 2)), Learner(refreshing(model))
    before = reference(learner)
    first = train(learner, 2)
    assert [timeless(row) for row in first] == [timeless(row) for row in train(plain, 2)], "nothing changes until then"
    assert same(reference(learner), snapshot(learner)) and same(before, reference(plain))
    (third,), (moved,) = train(learner, 1), train(plain, 1)
    assert third["kl"] == pytest.approx(0, abs=1e-6) and moved["kl"] > 1e-4
    assert not same(reference(learner), snapshot(learner))


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_reference_of_its_last_refresh(model: Path, tmp_path: Path, kept: str) -> None:
    run = refreshing(model, 1, reference_dtype=kept)
    straight = Learner(run)
    history = train(straight, 3)
    first = Learner(run)
    train(first, 2)
    first.save_state(tmp_path / "state")
    resumed = Learner(run)
    resumed.load_state(tmp_path / "state")
    assert same(reference(resumed), reference(first)) and not same(reference(resumed), reference(Learner(run)))
    (last,) = train(resumed, 1)
    assert timeless(last) == timeless(history[2]) and same(snapshot(resumed), snapshot(straight))
    resumed.save_state(tmp_path / "again")  # what was read is kept for the next resume
    third = Learner(run)
    third.load_state(tmp_path / "again")
    assert same(reference(third), reference(first))
