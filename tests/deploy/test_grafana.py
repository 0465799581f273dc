"""Dashboard and alert rules speak of metrics that exist, and promtool, where it is installed, agrees with them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from stage_ray.observability.registry import ALARMS, PREFIX, RAY_PREFIX, RECORDED, WORKER, Metric

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "stage-ray.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((GRAFANA / "alerts.yaml").read_text(encoding="utf-8"))
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
NAME = re.compile(rf"\b(?:{RAY_PREFIX})?{PREFIX}\w*")

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt-get install prometheus)"
)


def expressions() -> Iterator[tuple[str, str]]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"panel {panel['title']!r}", target["expr"]
    for rule in RULES:
        yield f"rule {rule['alert']}", rule["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["query"]["query"]


def known(name: str) -> bool:
    return any(re.fullmatch(re.sub(r"<\w+>", r"[a-z_0-9.+]+", metric.prometheus), name) for metric in RECORDED + WORKER)


def mentions(metric: Metric) -> bool:
    return any(metric.prometheus in NAME.findall(text) for _, text in expressions())


@pytest.mark.parametrize("where, expression", expressions(), ids=lambda text: text[:60])
def test_an_expression_asks_for_metrics_of_the_catalogue_only(where, expression):
    plain = re.sub(r'"[^"]*"', "", expression)  # patterns for names are no names
    names = NAME.findall(plain)
    assert names or plain != expression, f"{where} asks for no metric of ours"
    assert [name for name in names if not known(name)] == [], where


def test_a_metric_that_nothing_records_would_be_found_out():
    assert known("stage_ray_reward_clip") and known("ray_stage_ray_worker_images_total")
    assert not known("stage_ray_rewards") and not known("ray_stage_ray_worker_images") and not known("stage_ray_alarm")


def test_what_operators_must_see_is_on_the_dashboard():
    seen = ("reward/mean", "kl", "entropy/policy", "grad_norm", "ess", "staleness/max", "images_per_s", "time/wait_s")
    seen += ("busy/rollout", "queue/ready", "alarm", "workers/restarts", "rollout/reissued", "mismatch/abs_logprob")
    assert [m.name for m in RECORDED if m.name in seen and not mentions(m)] == []
    left_out = {"stage_ray_worker_groups", "stage_ray_worker_tokens_per_second"}  # said by images, and by their rates
    assert {m.name for m in WORKER if not mentions(m)} == left_out


def test_every_panel_has_a_place_of_its_own_a_title_and_a_data_source():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        assert panel["title"]
    sources = [panel["datasource"] for panel in PANELS] + [t["datasource"] for p in PANELS for t in p["targets"]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    letters = [[target["refId"] for target in panel["targets"]] for panel in PANELS]
    assert all(len(set(own)) == len(own) for own in letters)


def test_every_variable_that_an_expression_uses_is_defined():
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = {name for _, expression in expressions() for name in re.findall(r"\$([a-z_]\w*)", expression)}
    assert used <= defined and {"instance", "session"} <= used


def test_work_is_averaged_over_more_than_one_call_which_counts_when_it_ends():
    """Over Grafana's own interval, four scrapes, a wave of a minute is nothing, then thrice what is possible."""
    ranges = [part for _, expression in expressions() for part in re.findall(r"rate\([^\[]*\[(\w+)\]", expression)]
    assert len(ranges) == 5 and set(ranges) == {"5m"}
    busy = [expression for _, expression in expressions() if "stage_ray_busy_" in expression]
    assert len(busy) == 3 and all(expression.startswith("avg_over_time(") for expression in busy)


def test_the_dashboard_can_be_imported_as_it_is():
    assert DASHBOARD["uid"] == "stage-ray" and DASHBOARD["title"] and DASHBOARD["schemaVersion"] >= 39
    assert {panel["type"] for panel in PANELS} == {"timeseries", "stat"}
    assert "__inputs" not in DASHBOARD and DASHBOARD.get("id") is None
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Now", "Learning", "Throughput", "Health", "Each worker (Ray's metrics)"]


def test_every_alarm_has_one_rule_and_every_rule_says_what_to_do():
    alarmed = [name for rule in RULES for name in re.findall(r'stage_ray_alarm_total\{name="(\w+)"\}', rule["expr"])]
    assert sorted(alarmed) == sorted(ALARMS)
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) and {"StageRayNoProgress", "StageRayWorkerRestarts"} <= set(names)
    for rule in RULES:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert "$labels.instance" in rule["annotations"]["description"] and rule["annotations"]["summary"]


def test_no_progress_is_said_of_runs_that_still_report_only():
    (rule,) = [rule for rule in RULES if rule["alert"] == "StageRayNoProgress"]
    ranged, before, now = rule["expr"].split(" and ")
    assert ranged == "changes(stage_ray_step[30m]) == 0" and before == "stage_ray_step offset 30m >= 0"
    assert now == "stage_ray_step", "a range, or an offset, still sees a run that has ended"


@needs_promtool
def test_a_run_that_ended_is_silent_and_one_that_never_did_an_update_is_not(tmp_path):
    """An hour after the start one ends, on a last step of 40 minutes; the other is still at step 0."""
    series = {'stage_ray_step{instance="ended:1"}': "0+1x20 21x39 stale", 'stage_ray_step{instance="stuck:1"}': "0x120"}
    stuck = {"severity": "critical", "alertname": "StageRayNoProgress", "instance": "stuck:1"}
    for minute in (55, 65, 95):
        said = fired(series, f"{minute}m", tmp_path)
        assert ('instance="ended:1"' in said) == (minute == 55), f"{minute} minutes: {said}"
        assert all(f'{label}="{value}"' in said for label, value in stuck.items()), f"{minute} minutes: {said}"


@needs_promtool
def test_promtool_takes_the_rules():
    done = promtool("check", "rules", str(GRAFANA / "alerts.yaml"))
    assert f"{len(RULES)} rules found" in done


@needs_promtool
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_fires_when_it_should_and_is_quiet_before_and_after(rule, tmp_path):
    """One sample a minute: an hour as it should be, then what is wrong, then an hour as it should be."""
    series = {f'stage_ray_alarm_total{{name="{name}", instance="run:1"}}': "0x300" for name in ALARMS}
    series |= {'stage_ray_step{instance="run:1"}': "0+1x300", 'stage_ray_workers_restarts{instance="run:1"}': "0x300"}
    wrong = {
        "StageRayNoProgress": ('stage_ray_step{instance="run:1"}', "0+1x60 60x40 61+1x199"),
        "StageRayWorkerRestarts": ('stage_ray_workers_restarts{instance="run:1"}', "0x60 1 2 3 3x237"),
    }
    name = next(iter(re.findall(r'name="(\w+)"', rule["expr"])), "")
    alarmed = f'stage_ray_alarm_total{{name="{name}", instance="run:1"}}'
    broken, values = wrong.get(rule["alert"], (alarmed, "0x60 1x239"))
    series[broken] = values
    fires_at = "95m" if rule["alert"] == "StageRayNoProgress" else "65m"
    other = [r["alert"] for r in RULES if r["alert"] != rule["alert"]]
    fired = {"exp_labels": {**rule["labels"], "instance": "run:1"} | ({"name": name} if name else {})}
    case = {
        "rule_files": [str(GRAFANA / "alerts.yaml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "alert_rule_test": [
                    {"eval_time": "55m", "alertname": rule["alert"], "exp_alerts": []},
                    {"eval_time": "180m", "alertname": rule["alert"], "exp_alerts": []},
                    *({"eval_time": fires_at, "alertname": name, "exp_alerts": []} for name in other),
                ],
            }
        ],
    }
    file = tmp_path / "case.yaml"
    file.write_text(yaml.safe_dump(case))
    promtool("test", "rules", str(file))
    # That it fires: promtool compares annotations too, so an empty expectation must fail and name this alert.
    case["tests"][0]["alert_rule_test"] = [{"eval_time": fires_at, "alertname": rule["alert"], "exp_alerts": []}]
    file.write_text(yaml.safe_dump(case))
    said = promtool("test", "rules", str(file), code=1)
    assert all(f'{label}="{value}"' in said for label, value in fired["exp_labels"].items()), said


def fired(series: dict[str, str], eval_time: str, tmp_path: Path) -> str:
    """The alerts StageRayNoProgress at a time, as promtool prints what it did not expect."""
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": eval_time, "alertname": "StageRayNoProgress", "exp_alerts": []}],
    }
    rules = [str(GRAFANA / "alerts.yaml")]
    file = tmp_path / "case.yaml"
    file.write_text(yaml.safe_dump({"rule_files": rules, "evaluation_interval": "1m", "tests": [test]}))
    return promtool("test", "rules", str(file), code=1)


def promtool(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr
