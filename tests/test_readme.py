"""What README.md and deploy/README.md tell people to type works as written, or shrunk to seconds (tests/pages.py)."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

from stage_ray import train as loop
from stage_ray.cli import app, main
from stage_ray.inference import evaluate, generate
from stage_ray.train import RunSummary
from tests.pages import DEPLOY, README, REASONS, ROOT, TABLE, TRAIN, command_lines, named_tests, text
from tests.ray_head import BIN

SMALL = {
    "steps": "12",
    "evaluation.enabled": "false",
    "rollout.engine": "torch",
    "rollout.groups_per_step": "2",
    "rollout.group_size": "2",
    "rollout.threads": "1",
    "learner.threads": "1",
    "cluster.metrics_port": "null",
}
SHRUNK = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]


def ours(*pages: str) -> list[str]:
    """Lines of `stage-ray`, with a value for a loop's variable."""
    lines = [line for page in pages for line in command_lines(page)]
    return [line.replace("$seed", "20") for line in lines if line.startswith("stage-ray ")]


def the(beginning: str, ending: str = "") -> list[str]:
    """Words after the program's name, of the one such line of the README."""
    (line,) = [line for line in ours(README) if line.startswith(beginning) and line.endswith(ending)]
    return shlex.split(line)[1:]


@pytest.mark.parametrize("page", TABLE)
def test_every_command_line_of_a_page_has_a_test_or_a_reason(page):
    lines = set(command_lines(page))
    unlisted, gone = lines - TABLE[page].keys(), TABLE[page].keys() - lines
    assert not unlisted and not gone, f"tests/pages.py: add {unlisted}, remove {gone}"
    assert len(lines) >= 20


@pytest.mark.parametrize("how", sorted({how for page in TABLE.values() for how in page.values()}))
def test_what_is_said_to_run_a_line_is_there(how):
    assert named_tests(how) or how in REASONS
    for name in named_tests(how):
        file, _, function = name.partition("::")
        names = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert function in names, f"{file} has no {function}"


@pytest.mark.parametrize("line", ours(README))
def test_every_command_line_of_the_readme_is_one_that_the_program_takes(line):
    name, *rest = shlex.split(line)[1:]
    get_command(app).commands[name].make_context(name, rest)  # type: ignore[attr-defined]


TRAININGS = [line for line in ours(README, DEPLOY) if line.startswith(TRAIN) and "--dry-run" not in line]


@pytest.mark.parametrize("line", TRAININGS)
def test_every_training_of_the_pages_is_accepted_by_a_dry_run(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(line)[1:] if word != "--resume"]  # there is nothing to go on with
    assert main([*words, "--dry-run"]) == 0
    assert f"run_dir: {words[words.index('--run-dir') + 1]}\n" in capsys.readouterr().out


def test_make_train_is_the_default_job_and_make_knows_the_other_tasks_of_the_page():
    make = [
        "make",
        "--directory",
        str(ROOT),
        "--old-file=install",
        f"BIN={BIN}",
    ]  # this environment is the installed one
    done = subprocess.run([*make, "train", "ARGS=--dry-run"], capture_output=True, text=True, timeout=60, check=True)
    assert "run_dir: runs/stage_shapeworld\n" in done.stdout and "steps: 160\n" in done.stdout
    lines = [shlex.split(line)[1:] for line in command_lines(README) if line.startswith("make ")]
    assert sorted(words[0] for words in lines) == ["chaos", "test", "train"]
    for words in lines:
        planned = subprocess.run([*make, "--dry-run", *words], capture_output=True, text=True, timeout=60, check=True)
        wanted = {"train": "stage_shapeworld.yaml", "test": "-m pytest", "chaos": "--minutes 10 --seed 7"}[words[0]]
        assert wanted in planned.stdout


def test_the_lines_that_make_a_token_make_one_that_is_closed_to_others(tmp_path):
    makes = [line for page in TABLE for line in command_lines(page) if "get-auth-token" in line]
    assert len(makes) == 2 and len(set(makes)) == 1
    environment = {"HOME": str(tmp_path), "PATH": f"{BIN}:{os.environ['PATH']}"}
    script = f"export RAY_AUTH_MODE=token\n{makes[0]}"
    subprocess.run(["bash", "-ec", script], env=environment, capture_output=True, timeout=60, check=True)
    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) >= 32


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where somebody types the lines under "Use it": a run that was stopped, and gone on with."""
    home = tmp_path_factory.mktemp("home")
    (home / "configs").symlink_to(ROOT / "configs")
    begin, *_ = [line for line in ours(README) if line.endswith("--run-dir runs/mine")]
    metrics = home / "runs" / "mine" / "metrics.jsonl"
    first = subprocess.Popen([str(BIN / "stage-ray"), *shlex.split(begin)[1:], *SHRUNK], cwd=home)
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(100) == 143
    (home / "steps").write_text(str(metrics.read_text().count("\n")))
    typed(home, *the("stage-ray train", "--run-dir runs/mine --resume"), *SHRUNK)
    return home


def typed(home: Path, *words: str) -> str:
    done = subprocess.run([str(BIN / "stage-ray"), *words], cwd=home, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on(home):
    rows = [json.loads(line)["step"] for line in (home / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert 2 <= int((home / "steps").read_text()) < 12 and rows == list(range(1, 13))


@pytest.fixture
def at_home(home, monkeypatch) -> Path:
    """In that directory, where lines are typed into this process: it has imported already what each of them needs."""
    monkeypatch.chdir(home)
    return home


@pytest.mark.slow
def test_the_trained_model_is_evaluated(at_home, capsys):
    held_out = (ROOT / "stage_ray/shapeworld/assets/prompts/heldout.jsonl").read_text().splitlines()
    (at_home / "some.jsonl").write_text("\n".join(held_out[::10]))
    few = ["--prompts", "some.jsonl", "--images-per-prompt", "1", "--engine", "torch"]
    assert main([*the("stage-ray evaluate"), *few]) == 0
    assert len(json.loads((at_home / "mine.json").read_text())["images"]) == 10
    assert "GenEval" in capsys.readouterr().out


@pytest.mark.slow
def test_the_trained_model_draws(at_home):
    assert main([*the("stage-ray generate"), "--images", "1", "--engine", "torch"]) == 0
    assert sorted(path.name for path in (at_home / "pictures").iterdir()) == ["0000-0.png", "sheet.png"]


@pytest.mark.slow
def test_a_run_is_reported_anew(at_home, capsys):
    page = at_home / "runs" / "mine" / "report.html"
    page.unlink()
    assert main(the("stage-ray report")) == 0
    assert capsys.readouterr().out.strip() == "runs/mine/report.html" and page.stat().st_size > 10_000


def python_blocks() -> list[str]:
    """The README's: our functions, and transformers alone."""
    return re.findall(r"```python\n(.*?)```", text(README), flags=re.DOTALL)


def test_the_functions_do_what_the_page_shows(model, tmp_path, monkeypatch, capsys):
    """Training apart, which is that of the command; `model` is what it ends with, and the prompts are few."""
    script, _ = python_blocks()
    assert script.count("\n") == 10
    held_out = (ROOT / "stage_ray/shapeworld/assets/prompts/heldout.jsonl").read_text().splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join(held_out[::10]))

    def trained(run, *, resume, progress):
        Path(run.run_dir).mkdir(parents=True)
        (Path(run.run_dir) / "final").symlink_to(model)
        assert (run.steps, run.learner.lr, run.run_dir) == (200, 5e-5, "runs/python")
        return RunSummary(Path(run.run_dir), run.steps, 0.25, 0.5, Path(run.run_dir) / "report.html")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "train", trained)
    monkeypatch.setattr(evaluate, "evaluate", partial(evaluate.evaluate, engine="torch", prompts="some.jsonl"))
    monkeypatch.setattr(generate, "generate", partial(generate.generate, engine="torch"))
    exec(script, {})
    said = capsys.readouterr().out
    assert "0.25 before, 0.5 after, runs/python/report.html\n" in said and "\nGenEval 0.0" in said
    assert len(json.loads((tmp_path / "python.json").read_text())["images"]) == 40
    drawn = [f"0000-{image}.png" for image in range(4)]
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [*drawn, "sheet.png"]
    assert all(f"drawn/{name}" in said for name in drawn)


@pytest.mark.slow
def test_the_trained_model_is_one_of_plain_transformers(home):
    _, script = python_blocks()
    assert script.count("runs/stage_shapeworld/final") == 2
    script = script.replace("runs/stage_shapeworld/final", "runs/mine/final")
    subprocess.run([sys.executable, "-c", script], cwd=home, check=True, timeout=200)
    assert Image.open(home / "rings.png").size == (64, 64)
