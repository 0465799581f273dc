"""The metric registry knows every metric that is recorded, and nothing else; people read it as it is."""

from __future__ import annotations

import ast
import inspect
import re
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np

from stage_ray.cli import main
from stage_ray.learner.learner import Learner
from stage_ray.observability import alarms
from stage_ray.observability.metrics_logger import MetricsLogger, read_steps
from stage_ray.observability.progress import SHOWN
from stage_ray.observability.registry import ALARMS, RECORDED, find, markdown
from stage_ray.report.report import CHARTS
from stage_ray.run.recording import StepClock
from tests.fake_run import write_fake_run
from tests.learner_case import PROMPTS, sample_groups, score, tiny_run
from tests.learner_case import train as train_learner
from tests.observability.test_metrics_logger import scrape

METRICS = Path(__file__).parents[2] / "deploy" / "grafana" / "METRICS.md"


def unknown(names) -> list[str]:
    return sorted(name for name in names if find(name) is None)


def test_the_registry_names_the_metrics_of_a_real_learners_update(model):
    searching = {"search": "best_of", "search_options": {"candidates": 2, "biased": True}}
    learner = Learner(tiny_run(model, pipeline={"max_staleness": 1}, rollout=searching), threads=1)
    first, *others = sample_groups(learner.policy, PROMPTS, 4)
    older = [replace(first, embeds=np.zeros((4, 1, 1), np.float32)), *others]
    (fresh,) = train_learner(learner, 1)
    updates = fresh | learner.update(older, score(older))
    assert unknown(updates) == []
    told = {metric.name for metric in RECORDED if metric.where == "learner"}
    assert told == {found.name for name in updates if (found := find(name))}


def test_the_registry_names_the_metrics_of_the_step_clock():
    clock = StepClock()
    for lap in ("wait", "update", "publish"):
        clock.lap(lap)
    told = {metric.name for metric in RECORDED if metric.where == "driver"} - {"step", "alarms", "alarm"}
    assert set(clock.metrics(8)) == told


def test_invented_runs_of_other_tests_use_names_that_exist(tmp_path):
    write_fake_run(tmp_path / "run", steps=1, planned=1)
    assert unknown(read_steps(tmp_path / "run" / "metrics.jsonl")[0]) == []


def test_report_progress_and_alarms_read_metrics_that_exist():
    charted = {name for columns in CHARTS.values() for name in columns}
    asked = set(re.findall(r'metrics\.get\("([\w/]+)"', inspect.getsource(alarms)))
    assert len(asked) >= 6 and unknown(charted | asked | set(SHOWN)) == []


def test_an_unknown_metric_is_found_out():
    assert unknown({"reward/mean", "reward/clip", "reward/clip/soft", "staleness/two", "rewards/mean"}) == [
        "reward/clip/soft",
        "rewards/mean",
        "staleness/two",
    ]


def test_the_alarms_of_the_registry_are_those_that_ring():
    dicts = [node for node in ast.walk(ast.parse(inspect.getsource(alarms))) if isinstance(node, ast.Dict)]
    alerts = {key.value for node in dicts for key in node.keys if isinstance(key, ast.Constant)}
    assert set(ALARMS) == alerts | {"learner_lost"}  # which is no number of an update: `stage_ray.train` rings it


def test_the_endpoint_explains_a_metric_in_the_registrys_words(tmp_path):
    recorder = MetricsLogger(tmp_path, port=0, host="127.0.0.1")
    recorder.step(1, {"kl": 0.5, "reward/clip": 0.25})
    text = urllib.request.urlopen(f"http://127.0.0.1:{recorder.port}/metrics", timeout=10).read().decode()
    recorder.close()
    assert "# HELP stage_ray_kl k3 estimate of the KL to the reference model, unweighted [nats/token]\n" in text
    assert "# HELP stage_ray_reward_clip Unweighted mean of one scorer over the images that it was asked about" in text


def test_every_alarm_is_served_as_zero_before_it_rings(tmp_path):
    recorder = MetricsLogger(tmp_path, port=0, host="127.0.0.1")
    served = scrape(recorder.port or 0)
    recorder.close()
    assert {name: served[f'stage_ray_alarm_total{{name="{name}"}}'] for name in ALARMS} == dict.fromkeys(ALARMS, 0.0)


def test_metrics_md_is_what_the_command_prints(capsys):
    assert main(["metrics", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown() == METRICS.read_text(encoding="utf-8"), (
        "renew it: stage-ray metrics --markdown > deploy/grafana/METRICS.md"
    )


def test_the_table_for_people_has_every_metric(capsys):
    assert main(["metrics"]) == 0
    out = capsys.readouterr().out
    assert all(metric.name in out for metric in RECORDED)
