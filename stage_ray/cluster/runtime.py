"""Ray for a run: the cluster this process belongs to, the one that is named, or a new one on this machine.

Ray runs any code that its ports and sockets receive, as its user. A new one is therefore out of reach of other
machines (loopback only) and of other users of this one (a token that only this user can read, a private directory).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from unittest.mock import patch

import psutil
import ray
from ray._private import ray_constants, utils, worker
from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader, Config
from ray._private.node import Node

from stage_ray.actors.client import first_line
from stage_ray.cluster.object_store import store_mb, two_versions_mb
from stage_ray.config import RunConfig
from stage_ray.config.hardware import usable_cpus
from stage_ray.errors import ConfigError, RunError
from stage_ray.files import keep_private, private_directory
from stage_ray.signals import blocked_signals

log = logging.getLogger(__name__)

ANSWER_S = 10.0  # for a connection to a cluster's head


@contextlib.contextmanager
def _signals_left_alone() -> Iterator[None]:
    """Keep `ray.init` from SIGTERM: it would call ``sys.exit`` in the middle of whatever goes on, and print a stack and
    abort where its C++ hears of the signal."""
    with (
        patch.object(utils, "set_sigterm_handler", lambda handler: None),
        patch.object(ray_constants, "RAY_DISABLE_FAILURE_SIGNAL_HANDLER", True),
    ):
        yield


@_signals_left_alone()
def join_cluster(configured: str | None, key: str = "cluster.address") -> None:
    """Join a running cluster as a driver. Signal handlers stay as they are.

    Args:
        configured: ``auto`` or HOST:PORT, as ``key`` says; None is the cluster that RAY_ADDRESS names.

    Raises:
        ConfigError: the address is none that a driver can join.
        RunError: no cluster answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
    _require_answer(configured, key)
    address = configured or "auto"
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(f"no Ray cluster answers at {key} = {address!r}: {first_line(error)}") from error


@_signals_left_alone()
def start_ray(run: RunConfig, run_dir: Path, *, weights: bool = True) -> bool:
    """Join a cluster or start one on this machine; True if started. Signal handlers stay as they are.

    ``weights``: whether versions of the weights travel through its object store.

    Raises:
        ConfigError: the address is none that a driver can join, or no directory can hold Ray's sockets.
        RunError: no cluster at that address, or too little memory for the object store.
    """
    cluster, rollout, learner = run.cluster, run.rollout, run.learner
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
    if cluster.address is not None or "RAY_ADDRESS" in os.environ:
        join_cluster(cluster.address)
        if weights:
            _tell_of_small_stores(run)
        return False
    free_mb, wanted_mb = psutil.virtual_memory().available // 2**20, store_mb(run, weights=weights)
    if wanted_mb > free_mb:
        fix = "lower it" if cluster.object_store_mb else "it is null, which is what this model and batch need; set it"
        raise RunError(
            f"cluster.object_store_mb = {wanted_mb} is more than the {free_mb} MB of memory that are free; {fix}"
        )
    _tell_of_little_shared_memory(wanted_mb)
    cpus = rollout.workers * rollout.tensor_parallel * rollout.cpus + learner.ranks * learner.cpus
    cpus += sum(pool.workers * pool.cpus for pool in run.scoring_pools)
    directory = private_directory()  # Ray opens its own directories, and the sockets in them, to every user (0777)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # vLLM's torch.distributed, which knows no token
    remove_dead_sessions(directory / "ray")
    try:
        _demand_token()
        with _on_this_machine_alone(dashboard=cluster.dashboard), blocked_signals():
            context = ray.init(
                address="local",
                num_cpus=cluster.num_cpus or max(usable_cpus(), math.ceil(cpus)),
                object_store_memory=wanted_mb * 2**20,
                include_dashboard=cluster.dashboard,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=str(directory / "ray"),
                # Else it starts a process for each CPU, though every actor needs one with an environment of its own.
                # The head remembers 100,000 calls otherwise, hundreds of megabytes in a long run; none is asked for.
                _system_config={"prestart_worker_first_driver": False, "task_events_max_num_task_in_gcs": 1000},
            )
    except Exception as error:  # Ray raises a bare Exception when a node does not come up in time
        raise RunError(f"Ray did not start on this machine: {first_line(error)}") from error
    session, link = Path(context.address_info["session_dir"]), run_dir / "logs" / "ray"
    _end_at_once(worker._global_node, lock_session(session))
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(session / "logs")
    return True


@contextlib.contextmanager
def _on_this_machine_alone(*, dashboard: bool) -> Iterator[None]:
    """A Ray that starts within listens on 127.0.0.1 only, and starts no process that serves none there."""
    # With 127.0.0.1 as its node's address each of Ray's servers listens there only. Ray replaces a given 127.0.0.1
    # by the machine's address in the network (`resolve_ip_for_localhost`), and then every server binds all
    # interfaces, unless clusters are off. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 does that while Ray is imported.
    # The autoscaler, a reader of logs and a dashboard without pages, which each cost a second and serve none here,
    # are left out: Ray has no option for that.
    unused = ["start_monitor", "start_log_monitor"] + ["start_api_server"] * (not dashboard)
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False))
        for start in unused:
            patches.enter_context(patch.object(Node, start, lambda node, **options: None))
        yield


def _tell_of_small_stores(run: RunConfig) -> None:
    """Say so where a node of a cluster that was joined has no room for the weights in its object store."""
    kind = "GPU" if run.rollout.gpus or run.learner.gpus else "CPU"  # a node without any gets no version
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind)]
    smallest_mb = min((node.get("object_store_memory", 0) for node in nodes), default=0) / 2**20
    needed_mb = two_versions_mb(run)
    if nodes and needed_mb and smallest_mb < needed_mb:
        log.warning(
            "a node of this cluster has %d MB of object store, and two versions of the weights need %d: Ray keeps the "
            "rest on disk, which is slow; start its Ray with a larger --object-store-memory",
            *(smallest_mb, needed_mb),
        )


def _end_at_once(node: Node, lock: IO[str]) -> None:
    """Let `ray.shutdown` kill the node's processes, as they do not hear SIGTERM, and free the session's lock."""
    kill_all = node.kill_all_processes

    def kill(**options: bool) -> None:
        servers = {info.process.pid for infos in node.all_processes.values() for info in infos}
        started: list[psutil.Process] = []  # workers and agents
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                started += child.children(recursive=True) if child.pid in servers else []
        kill_all(**options | {"allow_graceful": False})
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        lock.close()

    patch.object(node, "kill_all_processes", kill).start()


def _tell_of_little_shared_memory(wanted_mb: int) -> None:
    """Say so where Ray would keep its objects on disk, as in a container with the usual 64 MB."""
    shared = Path("/dev/shm")
    if shared.is_dir() and (free_mb := shutil.disk_usage(shared).free // 2**20) < wanted_mb:
        log.warning(
            "/dev/shm has %d MB free and cluster.object_store_mb is %d: Ray keeps objects on disk, which is slow; give "
            "the container more shared memory (docker run --shm-size), or lower the key",
            *(free_mb, wanted_mb),
        )


def _require_answer(configured: str | None, key: str) -> None:
    """Raise unless something listens where a cluster should be; ``key``: of what is ``configured``, for messages.

    Ray itself would wait there for minutes, deaf to signals.
    """
    of_config = configured not in (None, "auto")
    source = key if of_config else "the variable RAY_ADDRESS"
    address = str(configured) if of_config else os.environ.get("RAY_ADDRESS", "auto")
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise ConfigError(
            f"{source} = {address!r} is no address that a run can join; give HOST:PORT of the head, where the port is "
            "Ray's own (6379 by default), or send the run to a dashboard's http:// address with stage-ray submit"
        )
    if not port.isdigit():  # auto, local
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        fix = "start that cluster, or set it to null" if of_config else "unset it, or start that cluster"
        raise RunError(f"no Ray cluster answers at {source} = {address!r} ({error}); {fix}") from error


def _demand_token() -> None:
    """Demand the user's token of every client; one without is given one, which Ray would leave readable by all."""
    os.environ["RAY_AUTH_MODE"] = "token"
    Config.initialize("")  # Ray read the variable when it was imported
    loader = AuthenticationTokenLoader.instance()
    token = Path(os.path.expanduser("~")) / ".ray" / "auth_token"
    if not loader.has_token(ignore_auth_mode=True):
        try:
            _write_token(token)
        except OSError:  # there is no home, or it is closed
            token = private_directory() / "auth_token"
            _write_token(token)
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        loader.reset_cache()
    if os.path.exists(token):  # a closed home raises nothing
        keep_private(token.parent)
        keep_private(token)


def _write_token(token: Path) -> None:
    """Write a new one, unless one is there."""
    token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=token.parent) as scratch:  # mode 0600 whatever the umask
        scratch.write(secrets.token_hex(32))
        scratch.flush()
        with contextlib.suppress(FileExistsError):  # another run was faster: its token serves both
            os.link(scratch.name, token)


# Ray leaves the directory of each session behind, with logs and what was spilled from memory. A run locks its session
# for as long as it lives, and the system frees the lock however it ends; those of other clusters have no such lock.


def lock_session(session: Path) -> IO[str]:
    """Mark a session as that of a living run of ours, until the file that is returned is closed."""
    file = session.with_name(f"{session.name}.lock").open("w", encoding="utf-8")
    with contextlib.suppress(OSError):  # a file system without locks: it is never removed
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def remove_dead_sessions(directory: Path) -> None:
    """Remove the sessions below ``directory`` whose runs have ended."""
    for lock in directory.glob("session_*.lock"):
        with contextlib.suppress(OSError), lock.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where its run lives
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            if not lock.with_suffix("").exists():  # a worker may outlive its run by a moment
                lock.unlink()
