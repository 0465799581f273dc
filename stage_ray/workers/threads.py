"""How many threads a worker computes with: its share of the cores that it may use where it runs."""

from __future__ import annotations

import os

import ray
import torch

from stage_ray.config import LearnerConfig, RolloutConfig, RunConfig
from stage_ray.config.hardware import usable_cpus


def own_threads(run: RunConfig, share: RolloutConfig | LearnerConfig) -> int:
    """The config's number; where it has none, this machine's usable cores over the processes that may share them.

    Those are the role's, or as many of them as Ray has room for on this node. Where rollout workers and learner work at
    once, each of the two roles has half of the cores.
    """
    if share.threads is not None:
        return share.threads
    if isinstance(share, RolloutConfig):
        processes = (share.max_workers or share.workers) * share.tensor_parallel
    else:
        processes = share.ranks
    here = ray.get_runtime_context().get_node_id()
    node: dict[str, float] = next((one["Resources"] for one in ray.nodes() if one["NodeID"] == here), {})
    wanted = {"CPU": share.cpus, "GPU": share.gpus, **share.resources}
    room = [int(node.get(name, 0) / amount + 1e-6) for name, amount in wanted.items() if amount]
    roles = 2 if run.pipeline.max_staleness > 0 else 1
    return max(1, usable_cpus() // roles // max(1, min(processes, *room)))


def use_own_threads(run: RunConfig, share: RolloutConfig | LearnerConfig) -> None:
    """Let torch compute with `own_threads`, which the driver could only guess; before vLLM, which keeps the number."""
    threads = own_threads(run, share)
    if torch.get_num_threads() != threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
