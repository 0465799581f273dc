"""Where the runs of a study train: side by side on this machine, or as Ray actors on the nodes of a cluster.

Either way a run is a process of its own with a Ray of its own, on as many cores as its share: no run can take another
one's workers, memory or place. A cluster only says which node has room, starts a run again where its node died, and
ends it when the study is stopped. So study and runs must lie on storage that all nodes share.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import RayError

from stage_ray.actors.client import first_line
from stage_ray.cluster.runtime import join_cluster
from stage_ray.config.hardware import usable_cpus
from stage_ray.errors import ConfigError, RunError
from stage_ray.files import private_directory

TrainRun = Callable[[Path, Path], Awaitable[int]]
"""Trains the run of a config to its end and appends what it says to a log; its exit code. Cancelled, it is saved."""

ABSENT = -1000  # exit code of a run that could not be started: no process ends with it
OF_ANOTHER_RAY = ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_NODE_ID")  # that the run would take for its own


@contextmanager
def places(address: str | None, cpus: int, gpus: float) -> Iterator[tuple[TrainRun, int | None]]:
    """How a run is trained, and how many may be at once; None leaves that to the cluster.

    Args:
        address: of the cluster; None is the one that RAY_ADDRESS names, or this machine.
        cpus, gpus: share of one run.

    Raises:
        ConfigError: GPUs are to be shared out and there is no cluster to do it.
        RunError: no cluster answers.
    """
    if address is None and "RAY_ADDRESS" not in os.environ:
        if gpus:
            raise ConfigError(
                f"gpus_per_run = {gpus:g} needs a Ray cluster, which gives each run its own GPUs: start one with "
                "ray start --head and set address: auto, or set gpus_per_run to 0"
            )
        yield (lambda config, log: train_process(config, log, cpus)), max(1, usable_cpus() // cpus)
        return
    join_cluster(address, "address")
    try:
        yield (lambda config, log: _train_on_a_node(config, log, cpus, gpus)), None
    finally:
        ray.shutdown()


async def train_process(config: Path, log: Path, cpus: int, directory: Path | None = None) -> int:
    """`TrainRun` in a process of this machine, on ``cpus`` cores that no other run of a study has.

    ``directory``: where relative paths of the config begin; None is this process's.
    """
    command = [sys.executable, "-m", "stage_ray", "train", str(config), "--auto-resume"]
    if setpriv := shutil.which("setpriv"):  # else a run goes on, and is locked, where its parent was killed
        command = [setpriv, "--pdeathsig", "TERM", "--", *command]
    environment = {name: value for name, value in os.environ.items() if name not in OF_ANOTHER_RAY}
    with own_cores(cpus) as cores, log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=directory,
        )
        if cores:  # it imports for seconds before it counts them, and its threads inherit them
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, cores)
        try:
            return await process.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()  # it saves what it has, and the next start goes on
            await process.wait()
            raise


class NodeRun:
    """The actor that trains one run, on a node with room for it. Ray starts it again elsewhere where the node dies."""

    async def train(self, config: Path, log: Path, cpus: int, directory: Path) -> int:
        """`TrainRun`; `ABSENT` where the study's directory is not on this node."""
        if not config.is_file():
            return ABSENT
        return await train_process(config, log, cpus, directory if directory.is_dir() else None)


async def _train_on_a_node(config: Path, log: Path, cpus: int, gpus: float) -> int:
    """`TrainRun` by a `NodeRun`; waits until a node has room."""
    make = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(NodeRun)
    actor = make.remote()
    call = actor.train.remote(config.resolve(), log.resolve(), cpus, Path.cwd())
    try:
        return int(await call)
    except asyncio.CancelledError:
        ray.cancel(call)
        with contextlib.suppress(RayError):  # it is cancelled once the run has saved what it has
            await call
        raise
    except RayError as error:
        raise RunError(f"the cluster could not train {config}: {first_line(error)}") from error
    finally:
        ray.kill(actor)


@contextmanager
def own_cores(count: int) -> Iterator[set[int]]:
    """Cores of this machine that no other process holds; all of them where every share is taken.

    Each is held by a lock, which the system frees however this process ends.
    """
    if not hasattr(os, "sched_getaffinity"):
        yield set()
        return
    cores = sorted(os.sched_getaffinity(0))
    for share in (cores[i : i + count] for i in range(0, len(cores) - count + 1, count)):
        with contextlib.ExitStack() as locks:
            try:
                for core in share:
                    file = locks.enter_context((private_directory() / f"core-{core}.lock").open("w"))
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # another run has one of them
                continue
            yield set(share)
            return
    yield set(cores)
