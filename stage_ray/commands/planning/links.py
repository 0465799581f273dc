"""What travels in one step, over which link, and how full that link is."""

from __future__ import annotations

from dataclasses import dataclass

from stage_ray.commands.planning import timing
from stage_ray.commands.planning.memory import group_bytes, weight_bytes
from stage_ray.commands.planning.split import Split, Task


@dataclass(frozen=True, slots=True)
class Link:
    """Traffic of one step; ``seconds`` is how long its busiest end is busy with it.

    Example:
        >>> Link("weights", "store -> rollout nodes", 26_000_000_000, 5.6, 4.6).seconds
        4.6
    """

    what: str
    way: str
    bytes: int
    gbs: float
    seconds: float


def links(task: Task, split: Split) -> list[Link]:
    """The links of a step, in the direction the data flows.

    Every rank reads every group, but a node pulls each object once; pictures go to the node that scores them; a version
    leaves the learner's node once for each node with rollout workers.
    """
    model, gpu, per_node = task.model, task.gpu, task.gpus_per_node
    images = split.groups * task.group_size
    groups, pictures = split.groups * group_bytes(model, task.group_size), images * model.picture_bytes
    nodes = {role: -(-count // per_node) for role, count in _counts(split).items()}
    several = split.gpus > per_node
    ray = min(timing.RAY_NODE_GBS, timing.NETWORK * gpu.host_network_gbs) if several else timing.HOST_COPY_GBS
    peers = timing.collective_gbs(gpu, split.ranks, per_node)
    wire = "Ray, between nodes" if several else "shared memory"
    ring = "NVLink" if gpu.nvlink_gbs else "PCIe"
    fabric = ring if split.ranks <= per_node else "NCCL, between nodes"
    sent = timing.collective_bytes(
        model,
        ranks=split.ranks,
        micro_batches=-(-images // split.ranks // split.cut.rows),
        dtype=task.dtype,
    )
    weights = weight_bytes(model)
    copies = max(1, split.remote_nodes)
    stored = timing.HOST_COPY_GBS * split.rollouts
    found = [
        _link("groups, pictures", "rollout -> store (shared memory)", groups + pictures, stored),
        _link("groups", f"store -> learner nodes: {nodes['ranks']} ({wire})", groups * nodes["ranks"], ray),
        _link("pictures", f"store -> reward nodes: {nodes['rewards']} ({wire})", pictures, ray * nodes["rewards"]),
    ]
    if nodes["ranks"] > 1:  # each node pulls for itself
        found[1] = Link(found[1].what, found[1].way, found[1].bytes, ray, groups / 1e9 / ray)
    if split.ranks > 1:
        found.append(_link("shards, gradients", f"learner rank -> rank ({fabric})", sent, peers))
    if task.transport == "nccl":
        found.append(_link("weights", "learner -> rollout (NCCL)", weights // 2, timing.NETWORK * gpu.network_gbs))
        return found
    if split.ranks > 1:
        found.append(_link("weights", f"ranks -> first rank ({fabric})", weights, peers))
    found.append(_link("weights", "first rank -> store (one core)", weights, timing.HOST_COPY_GBS))
    if split.remote_nodes:
        way = f"store -> rollout nodes: {split.remote_nodes} (Ray, between nodes)"
        found.append(_link("weights", way, copies * weights, ray))
    found.append(_link("weights", "store -> each rollout GPU (PCIe)", weights, timing.HOST_TO_GPU * gpu.pcie_gbs))
    return found


def fullest(found: list[Link]) -> Link:
    """The link that saturates first: the one that is busy longest in a step."""
    return max(found, key=lambda link: link.seconds)


def _counts(split: Split) -> dict[str, int]:
    return {"ranks": split.ranks, "rewards": split.rewards}


def _link(what: str, way: str, size: int, gbs: float) -> Link:
    return Link(what, way, size, gbs, size / 1e9 / gbs)
