"""Where the processes that share one model meet: the ranks of a learner, or of one rollout worker."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist


def init_process_group(rank: int, count: int, address: str, device: torch.device, timeout_s: float) -> None:
    """Make torch's default process group; blocks until all are there. gloo on a CPU, NCCL on GPUs.

    Whatever this process opens for that, now or in groups that are made of this one, is on the network of ``address``.

    Args:
        address: where rank 0 listens, HOST:PORT, as `free_address` gives it.
        timeout_s: how long a rank waits for another, here and in every exchange.
    """
    limit = timedelta(seconds=timeout_s)
    keep_to_network_of(address)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store_at(address, rank, count, limit),
        rank=rank,
        world_size=count,
        timeout=limit,
    )


def keep_to_network_of(address: str) -> None:
    """Let gloo and NCCL use the interface over which this machine reaches HOST:PORT; a user's own choice stays.

    Left to itself gloo listens where the machine's name leads, on stock Debian and Ubuntu 127.0.1.1, which no other
    machine reaches; and NCCL listens on the network even where all members are on 127.0.0.1.
    """
    interface = interface_to(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without the sign NCCL takes it for a prefix


def interface_to(address: str) -> str | None:
    """Name of the interface over which this machine reaches HOST:PORT; None where its address is on no interface.

    Example:
        >>> interface_to("127.0.0.1:6000") == interface_to("127.0.0.1:7000")
        True
    """
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # sends nothing: asks for the route
        own = probe.getsockname()[0]
    names = (name for name, found in psutil.net_if_addrs().items() if own in {item.address for item in found})
    return next(names, None)


def store_at(address: str, rank: int, count: int, limit: timedelta) -> dist.TCPStore:
    """Where processes find each other. Rank 0 listens at that address alone: left to itself it would on every one.

    Port 0 there is one that is free.
    """
    host, _, port = address.rpartition(":")
    if rank > 0:
        return dist.TCPStore(host, int(port), count, is_master=False, timeout=limit)
    listening = socket.create_server((host, int(port)), backlog=max(128, 2 * count))
    return dist.TCPStore(
        host,
        listening.getsockname()[1],
        count,
        is_master=True,
        timeout=limit,
        master_listen_fd=listening.detach(),
        wait_for_workers=False,
    )
