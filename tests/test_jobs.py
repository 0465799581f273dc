"""The same job through Ray's Jobs API: a real head node, `ray job submit`, no second Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def dashboard(tmp_path):
    """`ray start --head` on loopback, in a process group of its own; yields the Jobs API's address."""
    port, dashboard_port = free_port(), free_port()
    environment = with_token(tmp_path) | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={free_port()}",  # another Ray on this machine holds the default one
        "--num-cpus=4",
        f"--object-store-memory={200 * 2**20}",
    ]
    with (tmp_path / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path)
    try:
        wait_for(dashboard_port, head, tmp_path / "head.log")
        yield f"http://127.0.0.1:{dashboard_port}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def with_token(directory: Path) -> dict[str, str]:
    """An environment whose Ray demands a token that this user may never have had."""
    token = directory / "token"
    token.write_text("0123456789abcdef" * 4)
    plain = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return plain | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def wait_for(port: int, head: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and head.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"no Ray head within 90 s: {log.read_text()}")


def submit(address: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(BIN / "ray"),
        "job",
        "submit",
        "--address",
        address,
        "--working-dir",
        ".",
        "--",
        "stage-ray",
        *arguments,
    ]
    return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_a_submitted_job_attaches_to_the_running_cluster_and_its_exit_code_is_the_runs(dashboard, tmp_path):
    run_dir = tmp_path / "run"
    small = [
        "steps=1",
        "evaluation.enabled=false",
        "rollout.groups_per_step=2",
        "rollout.group_size=2",
        "cluster.metrics_port=null",
    ]
    settings = [part for item in small for part in ("--set", item)]
    done = submit(
        dashboard, with_token(tmp_path), "train", "configs/stage_shapeworld.yaml", "--run-dir", str(run_dir), *settings
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [1]
    assert not (run_dir / "logs" / "ray").exists(), "a second Ray was started"

    wrong = submit(dashboard, with_token(tmp_path), "train", "configs/stage_shapeworld.yaml", "--set", "learner.lrr=1")
    assert wrong.returncode != 0
    assert "did you mean 'learner.lr'?" in wrong.stdout + wrong.stderr
