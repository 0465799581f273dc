"""How many threads a worker computes with: its share of the cores that it may use where it runs."""

from __future__ import annotations

import os

import ray
import torch

from stage_ray.config import LearnerConfig, RolloutConfig, RunConfig
from stage_ray.config.hardware import usable_cpus


def own_threads(run: RunConfig, share: RolloutConfig | LearnerConfig) -> int:
    """The config's number; where it has none, this machine's usable cores over the processes that may share them.

    Where rollout workers and learner work at once, each of the two roles has half of the cores.
    """
    if share.threads is not None:
        return share.threads
    roles = 2 if run.pipeline.max_staleness > 0 else 1
    return max(1, usable_cpus() // roles // _processes_here(share))


def openmp_environment(run: RunConfig, share: RolloutConfig | LearnerConfig) -> dict[str, str]:
    """Variables of a worker's process: OpenMP, in torch, MKL and vLLM, reads them when it is loaded."""
    roles = [own_threads(run, one) * _processes_here(one) for one in (run.rollout, run.learner)]
    at_once = sum(roles) if run.pipeline.max_staleness > 0 else max(roles)
    return {"OMP_NUM_THREADS": str(own_threads(run, share)), **waiting(at_once)}


def waiting(threads: int) -> dict[str, str]:
    """How threads wait for each other where so many compute at once: where they outnumber the cores, asleep.

    By default they spin for milliseconds after each small operation, on cores that the other role's threads need. Where
    each has a core of its own, spinning is the faster way: waking a thread takes as long as a small operation.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE"} if threads > usable_cpus() else {}


def _processes_here(share: RolloutConfig | LearnerConfig) -> int:
    """Processes of a role that may share this node: all of them, or as many as Ray has room for on it."""
    if isinstance(share, RolloutConfig):
        processes = (share.max_workers or share.workers) * share.tensor_parallel
    else:
        processes = share.ranks
    here = ray.get_runtime_context().get_node_id()
    node: dict[str, float] = next((one["Resources"] for one in ray.nodes() if one["NodeID"] == here), {})
    wanted = {"CPU": share.cpus, "GPU": share.gpus, **share.resources}
    room = [int(node.get(name, 0) / amount + 1e-6) for name, amount in wanted.items() if amount]
    return max(1, min(processes, *room))


def use_own_threads(run: RunConfig, share: RolloutConfig | LearnerConfig) -> None:
    """Let torch compute with `own_threads`, which the driver could only guess; before vLLM, which keeps the number."""
    threads = own_threads(run, share)
    if torch.get_num_threads() != threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
