"""Ray for a run: the cluster this process belongs to, the one that is named, or a new one on this machine."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil
import ray

from stage_ray.config import ClusterConfig, RunConfig
from stage_ray.errors import RunError
from stage_ray.seats import first_line


def start_ray(run: RunConfig, run_dir: Path) -> bool:
    """Join a cluster or start one on this machine; True if started.

    Raises:
        RunError: no cluster at that address, or too little memory for the object store.
    """
    cluster = run.cluster
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
    address = cluster.address or ("auto" if "RAY_ADDRESS" in os.environ else None)
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise RunError(f"no Ray cluster answers at cluster.address = {address!r}: {first_line(error)}") from error
        return False
    _check_memory(cluster)
    try:
        context = ray.init(
            address="local",
            num_cpus=cluster.num_cpus or max(os.cpu_count() or 1, math.ceil(wanted_cpus(run))),
            object_store_memory=cluster.object_store_mb * 2**20,
            include_dashboard=cluster.dashboard,
            dashboard_host="127.0.0.1",
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level="ERROR",
        )
    except Exception as error:  # Ray raises a bare Exception when a node does not come up in time
        raise RunError(f"Ray did not start on this machine: {first_line(error)}") from error
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    link = logs / "ray"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(context.address_info["session_dir"]) / "logs")
    return True


def wanted_cpus(run: RunConfig) -> float:
    """Logical CPUs that all roles ask for together."""
    return run.rollout.workers * run.rollout.cpus + run.scoring.workers * run.scoring.cpus + run.learner.cpus


def _check_memory(cluster: ClusterConfig) -> None:
    free_mb = psutil.virtual_memory().available // 2**20
    if cluster.object_store_mb > free_mb:
        raise RunError(
            f"cluster.object_store_mb = {cluster.object_store_mb} is more than the {free_mb} MB of memory "
            "that are free; lower it"
        )
