"""A run that starts Ray itself is out of reach of other machines and of other users of this one. A real, tiny run."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
import yaml

from stage_ray.run.run_dir import open_run_dir
from tests.plain import plain_checkpoint
from tests.runs import tiny_run

REPOSITORY = Path(__file__).parents[1]
CALLS = [  # one of each server of Ray's object plane: GCS, raylet, object manager, every worker and the driver
    "NodeInfoGcsService/GetAllNodeInfo",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "CoreWorkerService/GetCoreWorkerStats",
    "ReporterService/GetTraceback",
]
PROGRAMS = ("gcs_server", "raylet", "dashboard.py", "DashboardAgent", "RuntimeEnvAgent", "Rollout", "Learner")
NUMBERS_ONLY = 4
"""Listeners that answer without a token, with numbers in Prometheus' format: ours, and Ray's autoscaler monitor,
dashboard and metrics agent. Ray has no setting that makes these demand the token, but they are on loopback."""


@dataclass(frozen=True)
class Run:
    """A run that stands still: its processes, the sockets they listen at, and the token of the user it runs as."""

    directory: Path
    token_file: Path
    processes: list[psutil.Process]
    listeners: list[tuple[str, str, int]]  # command line, address, port
    sockets: list[str]  # in the file system


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Run]:
    """A user without a token, with umask 000, the dashboard on; the run goes on to its end after the last test."""
    directory = tmp_path_factory.mktemp("security")
    gate, home = directory / "gate", directory / "home"
    home.mkdir()
    cluster = {"dashboard": True, "metrics_port": 0, "object_store_mb": 128}
    model = plain_checkpoint(directory / "plain")
    config = tiny_run(directory, model, steps=1, cluster=cluster).model_dump(mode="json")
    config["rewards"] = [{"type": "tests.scorers.Waits", "options": {"gate": str(gate)}}]
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "stage_ray", "train", str(directory / "config.yaml")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(home)}
    environment["RAY_worker_niceness"] = "0"
    with (directory / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, umask=0, stdout=output, stderr=output)
    try:
        wait_for(gate.with_suffix(".reached"), process, directory / "output")
        yield standing(process, Path(config["run_dir"]), home)
        gate.touch()
        assert process.wait(120) == 0, (directory / "output").read_text()
        loose = [
            path for path in Path(config["run_dir"]).rglob("*") if not path.is_symlink() and others_may_write(path)
        ]
        assert (Path(config["run_dir"]) / "final" / "model.safetensors").exists() and not loose
        assert not [p for p in psutil.process_iter(["cmdline"]) if str(directory) in " ".join(p.info["cmdline"] or [])]
    finally:
        process.kill()  # Ray's processes end with it


def wait_for(file: Path, process: subprocess.Popen, output: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the run did not get as far as its first score: {output.read_text()}")
        time.sleep(0.1)


def standing(process: subprocess.Popen, directory: Path, home: Path) -> Run:
    """The run once everything listens: agents of Ray that nothing waits for open their ports when they come to it."""
    deadline = time.monotonic() + 60
    before, now = None, look(process, directory, home)
    while missing(now) or before is None or (before.listeners != now.listeners and time.monotonic() < deadline):
        assert time.monotonic() < deadline, f"{missing(now)} listen nowhere, so nothing would be tested there"
        time.sleep(1)
        before, now = now, look(process, directory, home)
    return now


def missing(run: Run) -> list[str]:
    """Programs of a run that do not listen yet."""
    names = " ".join(name for name, _, _ in run.listeners)
    return [part for part in PROGRAMS if part not in names]


def look(process: subprocess.Popen, directory: Path, home: Path) -> Run:
    root = psutil.Process(process.pid)
    processes = [root, *root.children(recursive=True)]
    listeners, sockets = [], []
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # a command of an agent is gone soon
            name = " ".join(one.cmdline())
            inet = [c.laddr for c in one.net_connections("inet") if not c.raddr]
            listeners += [(name, address.ip, address.port) for address in inet]
            sockets += [c.laddr for c in one.net_connections("unix") if c.laddr]
    processes = [one for one in processes if one.is_running()]
    return Run(directory, home / ".ray" / "auth_token", processes, listeners, sockets)


def others_may_write(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def is_private(path: Path) -> bool:
    """Whether a directory above it is closed to everybody else."""
    return any(
        stat.S_IMODE(above.stat().st_mode) == 0o700 and above.stat().st_uid == os.getuid() for above in path.parents
    )


def rpc(port: int, call: str, token: str | None = None) -> str:
    """The status of an empty request to a gRPC server."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{call}")(b"", metadata=metadata, timeout=5)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


def http(port: int, path: str, token: str | None = None, body: bytes | None = None) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def port_of(run: Run, part: str) -> list[int]:
    return [port for name, _, port in run.listeners if part in name]


@pytest.mark.slow
def test_every_socket_of_a_local_run_is_on_loopback_or_in_a_private_directory(run):
    assert [entry for entry in run.listeners if not is_loopback(entry[1])] == []
    assert any(path.endswith("/sockets/plasma_store") for path in run.sockets)
    assert [path for path in run.sockets if not is_private(Path(path))] == []


@pytest.mark.slow
def test_every_listener_demands_the_token_but_those_that_only_count(run):
    open_to_all = []
    for name, _, port in run.listeners:
        statuses = {rpc(port, call) for call in CALLS}
        if "UNAUTHENTICATED" in statuses:
            assert statuses <= {"UNAUTHENTICATED", "UNIMPLEMENTED"}, (name, statuses)
            continue
        status, text = http(port, "/metrics")
        if status != 401:
            assert status == 200 and text.startswith(("# HELP", "# TYPE")), (name, status, text[:200])
            open_to_all.append(name)
    assert len(open_to_all) <= NUMBERS_ONLY, open_to_all


@pytest.mark.slow
def test_only_the_token_opens_the_object_plane_and_the_jobs_api(run):
    token = run.token_file.read_text()
    (gcs,) = port_of(run, "gcs_server")
    assert [rpc(gcs, CALLS[0], key) for key in (None, "wrong", token)] == ["UNAUTHENTICATED", "UNAUTHENTICATED", "OK"]
    (jobs,) = [port for port in port_of(run, "dashboard.py") if http(port, "/api/jobs/")[0] == 401]
    assert http(jobs, "/api/jobs/", "wrong")[0] == 403
    assert http(jobs, "/api/jobs/", body=b'{"entrypoint": "true"}')[0] == 401
    assert http(jobs, "/api/jobs/", token)[0] == 200


@pytest.mark.slow
def test_the_token_is_the_users_alone_and_written_nowhere_else(run):
    token = run.token_file.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(run.token_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(run.token_file.parent.stat().st_mode) == 0o700
    assert [p for p in run.processes if token in " ".join([*p.cmdline(), *p.environ().values()])] == []
    files = [Path(at) / name for at, _, names in os.walk(run.directory, followlinks=True) for name in names]
    assert any("logs/ray/" in str(path) for path in files) and any(path.name == "config.yaml" for path in files)
    assert [path for path in files if path.is_file() and token.encode() in path.read_bytes()] == []


def test_a_run_directory_is_closed_to_others_whatever_the_umask_and_whoever_made_it(tmp_path):
    before = os.umask(0)
    try:
        mine = tmp_path / "mine" / "run"
        with open_run_dir(tiny_run(tmp_path, tmp_path, run_dir=str(mine)), resume=False):
            pass
        shared = tmp_path / "shared"
        shared.mkdir(mode=0o777)
        with open_run_dir(tiny_run(tmp_path, tmp_path, run_dir=str(shared)), resume=False):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755, "what its owner lets others read stays readable"
    assert not [p for p in (mine.parent, mine / "config.yaml", shared / "config.yaml") if others_may_write(p)]
