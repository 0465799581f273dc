"""A real Ray head on this machine, as an operator starts one: `ray start --head`, a token, a Jobs API."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Head:
    """A running head: where its Jobs API answers, where drivers join, and an environment that has the token for it."""

    address: str
    gcs_address: str
    environment: dict[str, str]

    def command(self, *words: str, seconds: float = 280, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program of this environment (`ray`, `stage-ray`) beside the head, to its end."""
        return subprocess.run(
            [str(BIN / words[0]), *words[1:]],
            env=self.environment | variables,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def jobs(self) -> dict[str, dict[str, Any]]:
        """What the Jobs API knows of submitted jobs, by submission id."""
        return {job["submission_id"]: job for job in self._ask("/api/jobs/") if job["type"] == "SUBMISSION"}

    def reserved(self, submission_id: str) -> dict[str, float]:
        """What Ray's scheduler reserves, or reserved, for the driver of a job."""
        (driver,) = [
            actor for actor in self.state("actors") if actor["name"] == f"_ray_internal_job_actor_{submission_id}"
        ]
        return driver["required_resources"]

    def state(self, what: str) -> list[dict[str, Any]]:
        """What `ray list` shows of actors or nodes."""
        return self._ask(f"/api/v0/{what}?detail=true")["data"]["result"]["result"]

    def _ask(self, path: str) -> Any:
        return requests.get(f"{self.address}{path}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30).json()


def free_port() -> int:
    """A port that nobody has, below those that the system gives to whoever asks for any: there somebody may have it a
    second later."""
    while True:
        port = random.SystemRandom().randrange(21_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def ray_head(directory: Path, resources: dict[str, float] | None = None, *, jobs: bool = True) -> Iterator[Head]:
    """`ray start --head` on loopback, in a process group of its own that is gone afterwards.

    Without ``jobs`` no dashboard and no Jobs API: processes that work for as long as the head lives.
    """
    port, dashboard_port = free_port(), free_port()
    (directory / "tests").symlink_to(REPOSITORY / "tests")  # jobs may name the tests' model family and scorers
    environment = with_token(directory) | importing(directory)
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
        f"--include-dashboard={jobs}",
        "--include-log-monitor=false",  # it would read the workers' logs all the time, for drivers that do not ask
        f"--resources={json.dumps(resources or {})}",
        f"--object-store-memory={200 * 2**20}",
    ]
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else Ray takes the machine's address in the network
    with (directory / "head.log").open("wb") as log:
        head = subprocess.Popen(
            command, env=environment | loopback, stdout=log, stderr=log, start_new_session=True, cwd=directory
        )
    try:
        wait_for(dashboard_port if jobs else port, head, directory / "head.log")
        yield Head(f"http://127.0.0.1:{dashboard_port}", f"127.0.0.1:{port}", environment)
    finally:
        head.terminate()  # alone: it ends its children in their order
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


@contextlib.contextmanager
def joining(head: Head) -> Iterator[None]:
    """Runs of this process join the head instead of starting a Ray of their own, which takes as long as a tiny run."""
    from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader, Config

    def read_again() -> None:  # Ray read the variables when it was imported, and the token when it first needed one
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", head.gcs_address)
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)  # else 127.0.0.1 becomes another address
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            patch.setenv(name, head.environment[name])
        read_again()
        yield
    read_again()


def importing(directory: Path) -> dict[str, str]:
    """Variables with which this environment's programs are found, and modules in a directory."""
    modules = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
    return {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": modules}


def with_token(directory: Path) -> dict[str, str]:
    """An environment whose Ray demands a token that this user may never have had, and keeps its files to itself.

    In Ray's usual directory the head that was started last, by whatever test, is the one that jobs of all heads join.
    """
    token = directory / "token"
    token.write_text(TOKEN)
    plain = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    private = {"RAY_TMPDIR": tempfile.mkdtemp(prefix="ray-")}  # pytest's own paths are too long for its sockets
    return plain | private | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def wait_for(port: int, head: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and head.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"no Ray head within 90 s: {log.read_text()}")
