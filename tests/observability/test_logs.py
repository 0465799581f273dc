"""With ``logs.format: json`` whatever is logged is one JSON object a line; else nothing changes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import warnings
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from stage_ray.cli import main
from stage_ray.config.load import validate_config
from stage_ray.errors import ConfigError
from stage_ray.observability.logs import bind_context, log_error, start_logs, worker_environment
from stage_ray.observability.progress import LoggedProgress, Progress, progress_for
from tests.runs import tiny_run

BIN = Path(sys.executable).parent


@pytest.fixture
def out():
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        start_logs("json", "my-run")
    yield stream
    start_logs("text", "my-run")


def objects(text: str) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_every_line_says_when_how_grave_of_which_run_and_by_whom(out):
    pytest.importorskip("vllm.logger")  # it puts a field of its own into every record of the process
    logging.getLogger("stage_ray.actors.supervised").warning("%s; another takes its place", "rollout-0 died")
    (line,) = objects(out.getvalue())
    assert datetime.fromisoformat(line.pop("time")).utcoffset().total_seconds() == 0
    assert line == {
        "level": "WARNING",
        "logger": "stage_ray.actors.supervised",
        "message": "rollout-0 died; another takes its place",
        "run": "my-run",
        "role": "driver",
    }


def test_progress_is_lines_with_the_step_its_numbers_and_the_names_of_alarms(out):
    with LoggedProgress() as progress:
        progress.stage("starting workers")
        progress.step(3, 10, {"kl": math.nan, "reward/mean": 0.5, "images_per_s": None, "alarms": ["kl_blowup"]})
        progress.alarm("kl_blowup", "KL is 100% too large")
        with progress.bar("evaluating", total=2) as advance:
            advance(2)
        progress.note("report: here")
    started, stepped, alerts, *others = objects(out.getvalue())
    assert started["message"] == "starting workers ..." and "step" not in started
    assert (stepped["message"], stepped["step"], stepped["metrics"]) == ("step 3 of 10", 3, {"reward/mean": 0.5})
    assert (alerts["level"], alerts["alarm"], alerts["step"]) == ("WARNING", "kl_blowup", 3)
    assert alerts["message"] == "KL is 100% too large"
    assert [line["message"] for line in others] == ["evaluating (2) ...", "evaluating: done in 0:00", "report: here"]


def test_lines_carry_what_they_are_about_until_it_is_taken_away(out):
    bind_context(step=7, group_id=[3, 4])
    logging.getLogger("x").error("one")
    bind_context(group_id=None)
    logging.getLogger("x").error("two")
    one, two = objects(out.getvalue())
    assert (one["step"], one["group_id"]) == (7, [3, 4])
    assert two["step"] == 7 and "group_id" not in two


def test_a_traceback_is_in_its_line(out):
    try:
        raise OSError("the scoring service\nis down")
    except OSError:
        logging.getLogger("x").exception("scorer failed")
    (line,) = objects(out.getvalue())
    assert line["message"] == "scorer failed" and "OSError: the scoring service\nis down" in line["exc_info"]


def test_libraries_that_bring_a_terminal_of_their_own_and_warnings_come_along(out, capsys):
    library = logging.getLogger("some.library")
    library.addHandler(logging.StreamHandler(sys.stderr))  # as Ray, vLLM and transformers do
    library.propagate = False
    bind_context()
    library.warning("from a library")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("soon gone", FutureWarning, stacklevel=1)
    first, second = objects(out.getvalue())
    assert first["message"] == "from a library" and "soon gone" in second["message"]
    assert capsys.readouterr().err == ""


def test_text_leaves_logging_and_the_workers_as_they_are(tmp_path, capsys):
    handlers = list(logging.getLogger().handlers)
    run = tiny_run(tmp_path, tmp_path / "janus")
    assert type(progress_for(run)) is Progress
    bind_context(step=3)
    log_error("stage-ray: no")
    assert logging.getLogger().handlers == handlers and worker_environment() == {}
    assert capsys.readouterr().err == "stage-ray: no\n"


def test_workers_are_told_the_format_and_the_run(tmp_path, monkeypatch):
    progress_for(tiny_run(tmp_path, tmp_path / "janus", logs={"format": "json"}, run_dir=str(tmp_path / "seed-20")))
    told = worker_environment()
    start_logs("text", "")
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    code = "import logging, sys; from stage_ray.observability.logs import redirect_output\n"
    code += "redirect_output(sys.argv[1] or None, 'reward', 'reward-1'); logging.getLogger('y').error('hm')"
    command = [sys.executable, "-c", code]
    log = tmp_path / "w" / "reward-1.log"
    for where in (str(log), ""):  # of a local run; of a cluster that the run joined, where Ray keeps the output
        options = {"capture_output": True, "text": True, "timeout": 100, "env": dict(os.environ)}
        done = subprocess.run([*command, where], check=True, cwd=tmp_path, **options)
        (line,) = objects(done.stdout or log.read_text())
        assert (line["run"], line["role"], line["worker"]) == ("seed-20", "reward", "reward-1")
        assert bool(done.stdout) == (not where)


def test_a_worker_that_prints_without_end_keeps_two_short_files(tmp_path):
    code = "import os, subprocess, sys, time; from stage_ray.observability import logs\n"
    code += "logs.MOST_BYTES, logs.LOOK_S = 100_000, 0.01\n"
    code += "logs.redirect_output(sys.argv[1])\n"
    code += "older, said = sys.argv[1] + '.1', 0\n"
    code += "prints = subprocess.Popen(['yes'])\n"  # another program, which has the file open as well
    code += "while not os.path.exists(older): time.sleep(0.01)\n"
    code += "os.remove(older)\n"
    code += "while not os.path.exists(older): time.sleep(0.01)\n"
    code += "prints.kill(); prints.wait()\n"
    code += "os.remove(older)\n"
    code += "while not os.path.exists(older): os.write(2, b'native' * 1000); print('python', flush=True)\n"
    code += "logs.MOST_BYTES = 0\n"
    code += "while os.fstat(1).st_size: time.sleep(0.01)\n"
    code += "logs.MOST_BYTES = 100_000; print('the end')\n"
    log = tmp_path / "reward-0.log"
    subprocess.run([sys.executable, "-c", code, str(log)], check=True, timeout=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reward-0.log", "reward-0.log.1"]
    assert Path(f"{log}.1").stat().st_size < 2 * 2**20
    assert log.read_text() == "the end\n", "no hole where it was emptied"


def test_an_unexpected_error_is_a_line_too():
    code = "from stage_ray.observability.logs import start_logs; start_logs('json', 'r'); [][1]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    (line,) = objects(done.stdout)
    assert done.returncode == 1 and done.stderr == ""
    assert line["level"] == "CRITICAL" and "IndexError" in line["message"] and "Traceback" in line["exc_info"]


def test_another_format_is_refused_by_name(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"logs\.format = 'xml'"):
        tiny_run(tmp_path, tmp_path / "janus", logs={"format": "xml"})
    assert main(["train", str(Path("configs/stage_shapeworld.yaml")), "--set", "logs.format=xml"]) == 2
    assert "logs.format = 'xml'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_whose_scorer_never_works_says_why_in_json_in_its_alarms_and_in_its_report(tmp_path, plain):
    quiet = {"evaluation": {"enabled": False}, "logs": {"format": "json"}}
    run = tiny_run(tmp_path, plain, "Raises", steps=1, **quiet)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert validate_config(yaml.safe_load(config.read_text())) == run
    command = [str(BIN / "stage-ray"), "train", str(config)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}  # where the family and the scorer of the run are
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=root, env=environment)
    assert done.returncode == 1 and done.stderr == ""
    *_, alarm, error = objects(done.stdout)
    assert alarm["alarm"] == "no_valid_reward" and error["level"] == "ERROR"
    assert re.match("stage-ray: .*could not be scored.*the scoring service is down", error["message"])
    assert {error["run"], error["role"]} == {"run", "driver"}
    (kept,) = objects((Path(run.run_dir) / "alarms.jsonl").read_text())
    assert (kept["step"], kept["alarm"]) == (1, "no_valid_reward") and "the scoring service is down" in kept["text"]
    assert ">no_valid_reward<" in (Path(run.run_dir) / "report.html").read_text()
    log = objects((Path(run.run_dir) / "logs" / "reward-0.log").read_text())
    assert {(line["run"], line["role"], line["worker"]) for line in log} == {("run", "reward", "reward-0")}
    assert {group for line in log for group in line["group_id"]} >= {0, 1}
    assert all("the scoring service is down" in line["exc_info"] for line in log)
