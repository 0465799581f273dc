"""Asynchronous runs: bounded, repeatable in strict order, resumable, and hard to kill. Real Ray, real signals."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from stage_ray.cli import main
from stage_ray.commands.train import replay_run
from stage_ray.errors import ConfigError, RunError
from stage_ray.observability.progress import Progress
from stage_ray.observability.registry import RECORDED, find
from stage_ray.train import train
from stage_ray.workers.group_files import load_group
from tests.audit import Audit
from tests.chaos import audited, end_session, of_session, start_driver
from tests.plain import FAMILY
from tests.runs import PROMPTS, StopsAfter, lines, tiny_run, without_clocks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_ray")]  # for drivers in this process

QUICK = {"evaluation": {"enabled": False, "sample_every": 1000}}


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "final" / "model.safetensors")


def sound(run_dir: Path) -> Audit:
    """The audit of a run that has ended, after making sure that it found nothing wrong."""
    found = audited(run_dir, ended=True)
    assert found.sound, found
    return found


class KillsWorker(Progress):
    """Sends a signal to the process of a role when a step is done."""

    def __init__(self, role: str, step: int, number: int) -> None:
        super().__init__()
        self.role, self.at, self.number, self.killed = role, step, number, 0

    def step(self, step: int, total: int, metrics) -> None:
        super().step(step, total, metrics)
        if step == self.at and not self.killed:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # nor is a zombie one
                    if f"ray::{self.role}" in " ".join(process.cmdline()):
                        process.send_signal(self.number)
                        self.killed += 1


def test_generation_runs_ahead_to_the_bound_and_no_further_and_records_what_the_metric_registry_names(tmp_path, plain):
    run = train(tiny_run(tmp_path, plain, steps=6, pipeline={"max_staleness": 2}, **QUICK)).run_dir
    rows = lines(run / "metrics.jsonl")
    assert [row["staleness/max"] for row in rows] == [0, 1, 2, 2, 2, 2]
    named = {name: find(name) for row in rows for name in row}
    assert None not in named.values(), named
    # Others are of some recipes, of GPUs and of evaluations between the steps.
    every_run = {metric.name for metric in RECORDED if metric.where in ("driver", "learner", "stream")}
    asked_for = {"alarm", "search/gain", "mismatch/moved_abs_logprob"}  # those of what this run does not do
    assert every_run - {metric.name for metric in named.values()} == asked_for
    assert sound(run).trained == 12


PINNED = """
import os
from stage_ray.rewards.base import RewardOutput

class Pinned:
    def score(self, images, prompts):
        darkness = 1 - images.mean(axis=(1, 2, 3), dtype="float32") / 255
        answers = ({"said": os.environ["JUDGE"]},) * len(images)
        return RewardOutput(darkness, darkness >= 0, answers)
"""


def test_a_scorer_may_have_actors_of_its_own_and_packages_and_variables_that_others_lack(tmp_path, plain):
    wheel = tmp_path / "pinned-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        about = "pinned-1.0.dist-info"
        file.writestr("pinned.py", PINNED)
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: pinned\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    given = {"py_modules": [str(wheel)], "env_vars": {"JUDGE": "its own"}}
    pinned = {"type": "pinned.Pinned", "weight": 2, "groups_per_call": 2, "runtime_env": given}
    rewards = [pinned, {"type": "tests.scorers.Brightness"}]
    run = tiny_run(tmp_path, plain, steps=2, rewards=rewards, pipeline={"record": True}, **QUICK)
    done = train(run).run_dir
    assert [row["workers/reward"] for row in lines(done / "metrics.jsonl")] == [2, 2]
    _, scored = load_group(min((done / "groups").rglob("*.safetensors")))
    assert scored.names == ("Pinned", "Brightness") and scored.details[0]["Pinned"] == {"said": "its own"}
    assert scored.scores.sum(axis=1) == pytest.approx(1.0)


def test_a_strict_asynchronous_run_that_drops_groups_is_repeated_and_resumed_bit_for_bit(tmp_path, plain):
    changes = {"steps": 6, "pipeline": {"max_staleness": 1}, "options": {"word": "rings"}, **QUICK}
    whole = train(tiny_run(tmp_path / "whole", plain, "CannotJudge", **changes)).run_dir
    broken = tiny_run(tmp_path / "broken", plain, "CannotJudge", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(broken, progress=StopsAfter(4))
    resumed = train(broken, resume=True).run_dir
    rows = [without_clocks(lines(directory / "metrics.jsonl")) for directory in (whole, resumed)]
    for row in (*rows[0], *rows[1]):
        del row["scoring/rescored"]  # counted when it happens, in whatever step that falls
    assert rows[0] == rows[1]
    first, second = map(final_weights, (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sound(whole).dropped == sound(resumed).dropped == sum(row["scoring/replaced"] for row in rows[0]) > 2


def test_a_rollout_worker_that_hangs_is_replaced_and_its_groups_drawn_again(tmp_path, plain):
    killer = KillsWorker("RolloutWorker", 2, signal.SIGSTOP)
    cluster = {"object_store_mb": 128, "metrics_port": None, "heartbeat_s": 0.5, "heartbeat_deadline_s": 2.0}
    changes = {"steps": 5, "pipeline": {"max_staleness": 1}, "cluster": cluster, **QUICK}
    run = train(tiny_run(tmp_path, plain, **changes), progress=killer).run_dir
    assert killer.killed == 1
    assert lines(run / "metrics.jsonl")[-1]["workers/restarts"] >= 1
    assert sound(run).trained == 10


def test_signals_to_every_process_of_a_job_let_it_save_and_a_resumed_run_goes_on(tmp_path, plain):
    run = tiny_run(tmp_path, plain, steps=400, checkpoint={"every": 1000}, **QUICK)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    command = [sys.executable, "-m", "stage_ray", "train", str(config)]
    process = start_driver(command, stderr=subprocess.PIPE)
    metrics = Path(run.run_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.2)
    everyone = of_session(process.pid)  # as a scheduler sends them; a driver that saves hears no more than one
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM)
    for number in numbers:
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):  # some are short-lived, such as a command of an agent
                one.send_signal(number)
    _, complaint = process.communicate(timeout=60)
    first = signal.Signals(process.returncode - 128)  # of those that wait at once, the system delivers any first
    assert first in numbers, complaint
    found = re.search(rf"stopped by {first.name} after step (\d+); go on with --resume", complaint)
    assert found and (Path(run.run_dir) / "checkpoints" / f"step-{int(found[1]):06d}" / "manifest.json").exists()
    assert not psutil.wait_procs(of_session(process.pid), timeout=60)[1]
    assert lines(metrics)[-1]["workers/restarts"] == 0
    with pytest.raises(KeyboardInterrupt):
        train(run, resume=True, progress=StopsAfter(int(found[1]) + 1))
    assert [row["step"] for row in lines(metrics)] == list(range(1, int(found[1]) + 2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_ray_starts_ends_the_run_with_its_code_and_leaves_nothing_running(tmp_path, plain, number):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_run(tmp_path, plain, **QUICK).model_dump(mode="json")))
    command = [sys.executable, "-m", "stage_ray", "train", str(config)]
    driver = start_driver(command, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not of_session(driver.pid, "gcs_server") and time.monotonic() < deadline:
            time.sleep(0.05)
        driver.send_signal(number)
        _, complaint = driver.communicate(timeout=60)
        left = psutil.wait_procs(of_session(driver.pid), timeout=60)[1]
    finally:
        end_session(driver.pid)
    assert driver.returncode == 128 + number, complaint
    assert complaint.splitlines()[-1] == f"stage-ray: stopped by {number.name}; go on with --resume"
    assert not left


def test_a_replay_refuses_a_step_that_was_recorded_in_part(tmp_path):
    for step, groups in ((1, 2), (2, 1)):
        directory = tmp_path / "groups" / f"step-{step:06d}"
        directory.mkdir(parents=True)
        for group in range(groups):
            (directory / f"group-{group:08d}.safetensors").touch()
    with pytest.raises(RunError, match="step-000002 holds 1 groups, rollout.groups_per_step is 2"):
        replay_run(tiny_run(tmp_path, tmp_path), tmp_path, Progress())
    assert not (tmp_path / "run").exists()


def test_a_replay_without_recorded_groups_says_how_to_record_them(tmp_path, plain):
    with pytest.raises(ConfigError, match="record a run with pipeline.record=true"):
        replay_run(tiny_run(tmp_path, plain), tmp_path, Progress())


def test_a_version_that_several_ranks_broadcast_is_the_one_that_is_served(tmp_path, plain):
    run = tiny_run(
        tmp_path,
        plain,
        steps=3,
        rollout={"workers": 2},
        learner={"lr": 1e-3, "ranks": 2},
        cluster={"weight_transport": "gloo"},
        **QUICK,
    )
    directory = train(run).run_dir
    rows = lines(directory / "metrics.jsonl")
    # What the learner says of the tokens that were drawn with its weights; a step at this rate moves that by far more.
    assert all(row["mismatch/abs_logprob"] < 1e-4 for row in rows) and rows[-1]["kl"] > 1e-5
    assert sound(directory).reissued == 0


def test_an_evaluation_by_the_workers_of_a_cluster_is_the_one_of_a_single_process(tmp_path, plain):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = {"policy.family": FAMILY, "rewards": "[{type: tests.scorers.Bright}]", "rollout.threads": "1"}
    settings |= {"rollout.images_per_batch": "2", "rollout.dtype": "float32"}
    command = ["evaluate", str(plain), "--prompts", str(tmp_path / "prompts.txt"), "--images-per-prompt", "2"]
    command += ["--engine", "torch", *(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))]
    assert main([*command, "--json", str(tmp_path / "alone.json")]) == 0
    assert main([*command, "--json", str(tmp_path / "shared.json"), "--address", "auto", "--workers", "2"]) == 0
    assert (tmp_path / "alone.json").read_bytes() == (tmp_path / "shared.json").read_bytes()
