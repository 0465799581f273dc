"""What a run records can be read back by any of its three readers, and survives a crash."""

import json
import math
import socket
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from stage_ray.errors import RunError
from stage_ray.observability.metrics_logger import MetricsLogger, read_steps


@pytest.fixture
def recorder(tmp_path: Path):
    recorder = MetricsLogger(tmp_path, port=0, host="127.0.0.1")
    yield recorder
    recorder.close()


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_each_step_is_one_json_object_with_finite_numbers_or_null(recorder: MetricsLogger, tmp_path: Path) -> None:
    recorder.step(1, {"reward/mean": np.float32(0.5), "kl": math.nan, "loss": -math.inf, "alarms": ["kl_blowup"]})
    recorder.step(2, {"reward/mean": 1, "kl": None})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 1, "reward/mean": 0.5, "kl": None, "loss": None, "alarms": ["kl_blowup"]},
        {"step": 2, "reward/mean": 1, "kl": None},
    ]


def test_prometheus_serves_the_newest_step_under_the_same_names(recorder: MetricsLogger) -> None:
    recorder.step(1, {"reward/mean": 0.25, "alarms": ["a", "b"]})
    recorder.step(2, {"reward/mean": 0.75, "kl": math.inf, "alarms": []})
    assert recorder.port is not None and recorder.port > 0
    seen = scrape(recorder.port)
    assert seen["stage_ray_reward_mean"] == 0.75
    assert seen["stage_ray_step"] == 2
    assert seen["stage_ray_alarms"] == 0
    assert math.isnan(seen["stage_ray_kl"])


def test_prometheus_serves_the_step_before_the_first_update_and_after_a_rewind(tmp_path: Path) -> None:
    recorder = MetricsLogger(tmp_path, port=0, host="127.0.0.1", resume_step=2)
    assert scrape(recorder.port or 0)["stage_ray_step"] == 2
    recorder.step(3, {"kl": 0.5})
    recorder.rewind(1)
    assert scrape(recorder.port or 0)["stage_ray_step"] == 1
    recorder.close()


def test_prometheus_does_not_go_on_serving_what_a_later_step_did_not_measure(recorder: MetricsLogger) -> None:
    recorder.step(1, {"kl": 0.5, "mismatch/abs_logprob": 0.01})
    recorder.step(2, {"kl": 0.25})
    seen = scrape(recorder.port or 0)
    assert seen["stage_ray_kl"] == 0.25 and math.isnan(seen["stage_ray_mismatch_abs_logprob"])


def test_prometheus_counts_each_alarm_by_its_name(recorder: MetricsLogger) -> None:
    for step, name in ((1, "kl_blowup"), (2, "kl_blowup"), (2, "mismatch")):
        recorder.alarm(step, name, "one sentence")
    seen = scrape(recorder.port or 0)
    assert seen['stage_ray_alarm_total{name="kl_blowup"}'] == 2
    assert seen['stage_ray_alarm_total{name="mismatch"}'] == 1


def test_tensorboard_holds_the_same_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = MetricsLogger(tmp_path, port=None, host="127.0.0.1")
    recorder.step(1, {"kl": 0.125})
    recorder.step(2, {"kl": math.nan})
    recorder.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("kl")] == [(1, 0.125)]


def test_a_run_that_begins_anew_has_each_step_once_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for value in (1.0, 2.0):  # the first was killed before its first checkpoint
        recorder = MetricsLogger(tmp_path, port=None, host="127.0.0.1")
        recorder.step(1, {"kl": value})
        recorder.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("kl")] == [(1, 2.0)]


def test_a_resumed_run_forgets_the_steps_it_will_train_again(tmp_path: Path) -> None:
    first = MetricsLogger(tmp_path, port=None, host="127.0.0.1")
    for step in (1, 2, 3):
        first.step(step, {"kl": 0.1 * step})
        first.alarm(step, "kl_blowup", "KL is large")
    first.close()
    again = MetricsLogger(tmp_path, port=None, host="127.0.0.1", resume_step=2)
    again.step(3, {"kl": 9.0})
    again.close()
    assert [(row["step"], row["kl"]) for row in read_steps(tmp_path / "metrics.jsonl")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 9.0),
    ]
    assert [row["step"] for row in read_steps(tmp_path / "alarms.jsonl")] == [1, 2]


def test_nothing_is_forgotten_before_a_step_takes_its_place(tmp_path: Path) -> None:
    first = MetricsLogger(tmp_path, port=None, host="127.0.0.1")
    for step in (1, 2, 3):
        first.step(step, {"kl": 0.1 * step})
    first.alarm(3, "kl_blowup", "KL is large")
    first.close()
    kept = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "alarms.jsonl").open("a") as file:
        file.write('{"step": 3, "al')  # a crash
    again = MetricsLogger(tmp_path, port=None, host="127.0.0.1", resume_step=1)
    again.alarm(1, "learner_lost", "it died while it loaded the checkpoint")
    again.rewind(1)
    again.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept
    assert [row["alarm"] for row in read_steps(tmp_path / "alarms.jsonl")] == ["kl_blowup", "learner_lost"]
    last = MetricsLogger(tmp_path, port=None, host="127.0.0.1", resume_step=1)
    last.step(2, {"kl": 9.0})
    last.close()
    assert [row["step"] for row in read_steps(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [row["alarm"] for row in read_steps(tmp_path / "alarms.jsonl")] == ["learner_lost"]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kl": 0.5}\n{"step": 2, "kl"')
    recorder = MetricsLogger(tmp_path, port=None, host="127.0.0.1", resume_step=2)
    recorder.step(3, {"kl": 0.25})
    recorder.close()
    assert [row["step"] for row in read_steps(path)] == [1, 3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl line 2 "):
        read_steps(path)


def test_a_taken_port_is_one_sentence_that_names_the_key(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RunError, match=r"cluster\.metrics_port to 0"):
            MetricsLogger(tmp_path / "run", port=taken.getsockname()[1], host="127.0.0.1")
    assert not (tmp_path / "run").exists(), "nothing is written before the port is known to be free"


def test_closing_frees_the_port(tmp_path: Path) -> None:
    recorder = MetricsLogger(tmp_path, port=0, host="127.0.0.1")
    port = recorder.port
    recorder.close()
    MetricsLogger(tmp_path, port=port, host="127.0.0.1").close()
