"""A training through Ray's Jobs API: a real head node, `ray job submit` and `stage-ray submit`, no second Ray."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest

from stage_ray.cli import main
from tests.chaos import audited
from tests.plain import FAMILY
from tests.ray_head import BIN, REPOSITORY, Head, joining, ray_head

pytestmark = pytest.mark.slow  # a head that they share, and a job or more each

CONFIG = "configs/stage_shapeworld.yaml"
SMALL = {
    "steps": "1",
    "evaluation.enabled": "false",
    "rollout.engine": "torch",  # starts in a quarter of vLLM's time
    "rollout.groups_per_step": "2",
    "rollout.group_size": "2",
    "rollout.threads": "1",
    "learner.threads": "1",
    "cluster.metrics_port": "null",
}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head"), resources={"driver": 1}) as running:
        yield running


def settings(model: Path | None = None, **changes: str) -> list[str]:
    """`--set` for a run of seconds, of `tests.plain`'s ``model`` if one is given; ``rollout__cpus``: `rollout.cpus`."""
    light = {"policy.family": FAMILY, "policy.path": str(model), "rewards": "[{type: tests.scorers.Brightness}]"}
    keys = SMALL | (light if model else {}) | {key.replace("__", "."): value for key, value in changes.items()}
    return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]


def steps(run_dir: Path) -> list[int]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def submit(head: Head, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return head.command("stage-ray", "submit", CONFIG, "--address", head.address, *arguments, **variables)


def submit_here(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported already what it needs."""
    out, err = io.StringIO(), io.StringIO()
    with (
        joining(head),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_API_SERVER_ADDRESS", head.address)
        code = main(["submit", CONFIG, "--address", head.address, *arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def together(*calls: Callable[[], subprocess.CompletedProcess[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Commands that do not depend on each other, at the same time: most of their seconds are imports and waiting."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def until(what: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.2)


def test_ray_job_submit_fails_with_the_run(head):
    words = ["ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--", "stage-ray", "train"]
    wrong = head.command(*words, CONFIG, "--set", "learner.lrr=1")
    assert wrong.returncode != 0
    assert "did you mean 'learner.lr'?" in wrong.stdout + wrong.stderr


SCORER = """
import numpy as np
import stage_ray
from stage_ray.rewards.base import RewardOutput

class Brightness:
    def __init__(self, licence):
        assert "Apache" in open(licence).read()

    def score(self, images, prompts):
        scores = stage_ray.SENT * images.mean(axis=(1, 2, 3), dtype=np.float32)  # no other copy has SENT
        return RewardOutput(scores, np.isfinite(scores), tuple({} for _ in scores))
"""


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A directory with a `stage_ray` that no node of the cluster has, and a package of scorers beside it."""
    shutil.copytree(REPOSITORY / "stage_ray", tmp_path / "stage_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name, line in (("__init__.py", "SENT = 0.5"), ("__main__.py", 'print("this is the code that was sent")')):
        file = tmp_path / "stage_ray" / name
        file.write_text(f"{line}\n{file.read_text()}")
    (tmp_path / "my_scorers").mkdir()
    (tmp_path / "my_scorers" / "__init__.py").write_text(SCORER)
    return tmp_path


def test_submit_sends_code_files_and_scorers_follows_the_run_and_does_not_repeat_it(head, changed, plain):
    waits = ["--run-dir", "/shared/runs/waits", "--id", "waits", "--no-wait"]
    waits += ["--entrypoint-resources", "{driver: 2}"]  # the cluster has one
    run_dir, more = changed / "run", changed / "more.yaml"
    more.write_text(json.dumps({"py_modules": [str(changed / "my_scorers")], "env_vars": {"A_SETTING": "1"}}))
    arguments = ["--run-dir", str(run_dir), "--env", "A_TOKEN", "--runtime-env", str(more), "--entrypoint-cpus", "0.5"]
    mine = "[{type: my_scorers.Brightness, options: {licence: LICENSE}}]"
    arguments += settings(plain, rewards=mine)
    secret = {"A_TOKEN": "hush-hush", "PYTHONPATH": str(changed)}  # the latter, that the command is the changed one

    waiting = submit_here(head, *waits)
    done = submit(head, *arguments, "--id", "sent", "--entrypoint-resources", "{driver: 1}", **secret)
    assert waiting.returncode == 0 and done.returncode == 0, done.stdout + done.stderr
    assert "this is the code that was sent" in done.stdout
    assert steps(run_dir) == [1] and not (run_dir / "logs" / "ray").exists()
    assert str(run_dir / "report.html") in done.stdout, "the job's log was not followed"
    assert "hush-hush" not in done.stdout + done.stderr
    job = head.jobs()["sent"]
    assert job["metadata"]["stage_ray_run_dir"] == str(run_dir)
    assert job["runtime_env"]["env_vars"].items() >= {"A_TOKEN": "hush-hush", "A_SETTING": "1"}.items()
    assert head.reserved("sent") == {"CPU": 0.5, "driver": 1.0}
    assert head.jobs()["waits"]["status"] == "PENDING", "a driver does not wait for what it asked for"

    again, other, listed = together(
        lambda: submit(head, *arguments, "--id", "sent", **secret),
        lambda: submit(head, *arguments, "--id", "sent", "--set", "seed=1", **secret),
        lambda: head.command("ray", "job", "list", "--address", head.address),
    )
    assert again.returncode == 0 and "has succeeded already" in again.stderr
    assert other.returncode == 1 and "--id sent: job sent (succeeded) had another config" in other.stderr
    assert listed.returncode == 0 and "'sent'" in listed.stdout and "sent.2" not in listed.stdout, listed.stdout


def test_what_only_the_cluster_can_find_wrong_has_the_exit_code_of_the_run(head, tmp_path, plain):
    nowhere = ["--run-dir", str(tmp_path / "a"), *settings(policy__path="/nowhere/janus")]
    too_much = ["--run-dir", str(tmp_path / "b"), *settings(plain, rollout__cpus="1000", cluster__start_timeout_s="15")]
    wrong = submit_here(head, *nowhere, "--image-has-code")  # the code is there already
    failed = submit_here(head, *too_much, "--id", "too-much")
    assert wrong.returncode == 2 and "/nowhere/janus does not exist" in wrong.stdout, wrong.stdout + wrong.stderr
    assert failed.returncode == 1 and "1000" in failed.stdout, failed.stdout + failed.stderr
    again = submit_here(head, *too_much, "--id", "too-much", "--no-wait")
    assert again.returncode == 0 and "too-much.2" in again.stderr and "--follow too-much.2" in again.stderr
    head.command("ray", "job", "stop", "too-much.2", "--address", head.address)


def test_a_job_is_joined_left_stopped_killed_and_goes_on_without_losing_a_group(head, tmp_path, plain):
    run_dir = tmp_path / "long"
    long = settings(plain, steps="60", checkpoint__every="10")
    arguments = ["--run-dir", str(run_dir), "--id", "long", *long]
    words = [str(BIN / "stage-ray"), "submit", CONFIG, "--address", head.address, *arguments]

    def follow() -> subprocess.Popen[str]:
        return subprocess.Popen(
            words, env=head.environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    assert submit_here(head, *arguments, "--no-wait").returncode == 0
    until(lambda: len(steps(run_dir)) >= 2)

    (driver,) = drivers(str(run_dir))
    os.kill(driver, signal.SIGSTOP)  # the run must not end while the other commands start; its log stands still
    left = follow()
    assert left.stdout is not None
    until(lambda: "step" in left.stdout.readline())  # it shows the log of the job that another command started
    left.send_signal(signal.SIGINT)
    said = left.communicate(timeout=60)[0]
    assert left.returncode == 130 and f"ray job stop long --address {head.address}" in said
    assert head.jobs()["long"]["status"] == "RUNNING" and "long.2" not in head.jobs()

    stayed = follow()
    other = submit_here(head, "--run-dir", str(run_dir), *long, "--set", "seed=1")
    assert other.returncode == 1 and "job long is writing into" in other.stderr
    assert head.command("ray", "job", "stop", "long", "--no-wait", "--address", head.address).returncode == 0
    os.kill(driver, signal.SIGCONT)
    said = stayed.communicate(timeout=120)[0]
    assert stayed.returncode == 143 and "stopped by SIGTERM after step" in said, said  # it had time to save
    before = steps(run_dir)
    assert len(before) < 60, "the run was over before it could be stopped"

    second = follow()
    until(lambda: len(steps(run_dir)) > len(before))
    (driver,) = drivers(str(run_dir))
    os.kill(driver, signal.SIGKILL)
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 137, said

    third = submit_here(head, *arguments)
    assert third.returncode == 0, third.stdout + third.stderr
    assert "long.3" in third.stderr and steps(run_dir) == list(range(1, 61))
    found = audited(run_dir, ended=True)
    assert found.sound and (found.steps, found.trained) == (60, 120), found


def drivers(run_dir: str) -> list[int]:
    """Processes that are the training itself: no shell around it, no worker of it."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:4] == ["-m", "stage_ray", "train"] and run_dir in words:
            found.append(process.info["pid"])
    return found


def test_a_cluster_that_wants_a_token_says_so_in_one_sentence(head, tmp_path):
    expected: list[tuple[dict[str, str], str]] = [
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token"),
        ({"RAY_AUTH_TOKEN": "f" * 64}, "refuses this token"),
        ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none"), "HOME": str(tmp_path)}, "token"),
    ]
    run_dir = "/shared/runs/first"
    answers = together(*(partial(submit, head, "--run-dir", run_dir, **variables) for variables, _ in expected))
    for done, (_, sentence) in zip(answers, expected, strict=True):
        assert done.returncode == 1 and sentence in done.stderr, done.stderr
        assert done.stderr.startswith("stage-ray: ") and done.stderr.count("\n") == 1, done.stderr
