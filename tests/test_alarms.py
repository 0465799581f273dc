from __future__ import annotations

from pathlib import Path

import pytest

from stage_ray.alarms import alarms
from tests.learner_case import tiny_run

RUN = tiny_run(Path("nowhere"))
HEALTHY = {
    "grad_norm": 0.7,
    "advantage/zero_groups": 0.25,
    "reward/informative": 0.75,
    "entropy/policy": 4.0,
    "entropy/reference": 4.2,
    "kl": 0.02,
    "mismatch/abs_logprob": 0.004,
}


def test_a_healthy_step_raises_no_alarm() -> None:
    assert alarms(HEALTHY, RUN) == []


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        ({"grad_norm": 0.0}, "zero_gradient", "exactly 0"),
        ({"advantage/zero_groups": 1.0}, "no_variance", "every group"),
        ({"reward/informative": 0.0}, "no_valid_reward", "entropy reward alone"),
        ({"entropy/policy": 2.0}, "entropy_collapse", "2 nats, the reference's 4.2"),
        ({"kl": 0.8}, "kl_blowup", "0.8 nats"),
        ({"mismatch/abs_logprob": 0.3}, "mismatch", "0.3 nats"),
    ],
)
def test_each_silent_failure_has_its_alarm(change: dict[str, float], name: str, text: str) -> None:
    found = alarms(HEALTHY | change, RUN)
    assert [alarm for alarm, _ in found] == [name]
    assert text in found[0][1]


def test_without_the_entropy_reward_nothing_steers() -> None:
    run = tiny_run(Path("nowhere"), algorithm={"entropy_reward": 0.0})
    assert "nothing steers" in alarms(HEALTHY | {"reward/informative": 0.0}, run)[0][1]


def test_what_was_not_measured_raises_no_alarm() -> None:
    assert alarms({}, RUN) == []
