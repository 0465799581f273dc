"""Process groups: ranks that share one model, and a weight broadcast group of the learner and all rollout workers.

vLLM has a weight transfer too. It loads what it receives at once, so that one that breaks off half-way leaves a model
which the next whole version may not load into, and it waits for a dead peer for ever. Here a version arrives as a whole
and is verified before any engine hears of it, which takes memory for one more copy of the weights (promise 6).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from stage_ray.records import WeightManifest
from stage_ray.weights.manifest import DTYPES, WeightError, verify

Backend = Literal["gloo", "nccl"]
DEVICES = {"gloo": torch.device("cpu"), "nccl": torch.device("cuda")}  # where the bytes lie that each carries


@dataclass(frozen=True, slots=True)
class GroupMember:
    """One member of a weight broadcast group."""

    number: int  # of the group: one that is built again has another
    address: str  # of rank 0, the learner: HOST:PORT
    rank: int
    count: int
    backend: Backend
    timeout_s: float  # to connect, and again for each version


def init_process_group(rank: int, count: int, address: str, device: torch.device, timeout_s: float) -> None:
    """Make torch's default process group, gloo on a CPU and NCCL on GPUs; blocks until all are there.

    Whatever this process opens for that, now or in groups that are made of this one, is on the network of ``address``
    (HOST:PORT), where rank 0 listens. A rank waits ``timeout_s`` for another, here and in every exchange.
    """
    keep_to_network_of(address)
    store, limit = _store(address, rank, count, timeout_s), timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)


def keep_to_network_of(address: str) -> None:
    """Let gloo and NCCL use the interface over which this machine reaches HOST:PORT; a user's own choice stays.

    Left to itself gloo listens where the machine's name leads, on stock Debian and Ubuntu 127.0.1.1, which no other
    machine reaches; and NCCL listens on the network even where all members are on 127.0.0.1.
    """
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # sends nothing: asks for the route
        own = probe.getsockname()[0]
    for interface, found in psutil.net_if_addrs().items():
        if own in {item.address for item in found}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without the sign NCCL takes it for a prefix


class BroadcastGroup:
    """This process's end of a weight broadcast group. It stays connected for as long as it is the same member.

    `send` and `receive` raise a WeightError where a member died, hung or was too slow, or had no memory for a version:
    which members have it is unknown then, and the group must be built again.
    """

    def __init__(self) -> None:
        self._member: GroupMember | None = None
        self._group: Any = None
        self._store: dist.TCPStore | None = None

    def open(self, host: str, timeout_s: float) -> str:
        """Listen for the members of a new group, as its rank 0; HOST:PORT."""
        self._store = _store(f"{host}:0", 0, 1, timeout_s)
        return f"{host}:{self._store.port}"

    def send(self, member: GroupMember, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Pass a version on, tensors in the order of its manifest."""
        device = DEVICES[member.backend]
        self._pass(member, (tensor.detach().to(device).contiguous() for _, tensor in tensors))

    def receive(self, member: GroupMember, manifest: WeightManifest) -> list[tuple[str, Tensor]]:
        """All tensors of a version, in memory of their own; a WeightError too where they are not the manifest's."""
        device = DEVICES[member.backend]
        tensors: list[Tensor] = []

        def rooms() -> Iterator[Tensor]:  # where `_pass` finds it out if there is none: one more copy may not fit
            for spec in manifest.tensors:
                tensors.append(torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=device))
                yield tensors[-1]

        self._pass(member, rooms())
        verify(manifest, tensors)
        return [(spec.name, tensor) for spec, tensor in zip(manifest.tensors, tensors, strict=True)]

    def _pass(self, member: GroupMember, tensors: Iterable[Tensor]) -> None:
        try:
            if member != self._member:
                self._member = self._group = None
                self._group, self._member = _join(member, self._store), member
            deadline = time.monotonic() + member.timeout_s
            for tensor in tensors:
                if tensor.numel():
                    self._broadcast(member, tensor.view(-1).view(torch.uint8), deadline - time.monotonic())
        except (RuntimeError, OSError) as error:  # torch's errors of a group are the first
            self._member = self._group = self._store = None  # it leaves the group, and the others notice
            raise WeightError(f"rank {member.rank} of {member.count}: {str(error).splitlines()[0]}") from error

    def _broadcast(self, member: GroupMember, data: Tensor, seconds: float) -> None:
        if seconds <= 0:
            raise RuntimeError(f"a version took longer than {member.timeout_s:g} s")
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = 0, timedelta(seconds=seconds)
        # gloo, given a limit here, would leave the operation pending, and the group's end wait for that.
        limit = () if member.backend == "gloo" else (options.timeout,)
        self._group.broadcast([data], options).wait(*limit)


def _join(member: GroupMember, opened: dist.TCPStore | None) -> Any:
    """A process group apart from torch's default one, which several ranks of a learner and vLLM have for themselves."""
    if opened is None:
        host, _, port = member.address.rpartition(":")
        # Rank 0 listens already: where it does not it is dead, and a `TCPStore` would wait for it.
        socket.create_connection((host, int(port)), timeout=member.timeout_s).close()
        opened = _store(member.address, member.rank, member.count, member.timeout_s)
    keep_to_network_of(member.address)
    place = dist.PrefixStore("weights", opened), member.rank, member.count
    limit = timedelta(seconds=member.timeout_s)
    if member.backend == "gloo":
        return dist.ProcessGroupGloo(*place, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    variable = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(variable)
    os.environ[variable] = "1"  # read once, here: a deadline is then an error in `wait`, and not the end of the process
    try:
        return dist.ProcessGroupNCCL(*place, options)
    finally:
        del os.environ[variable]
        os.environ |= {variable: before} if before is not None else {}


def _store(address: str, rank: int, count: int, timeout_s: float) -> dist.TCPStore:
    """Where processes find each other. Rank 0 listens at that address alone, not on every one; port 0 is a free one."""
    host, _, port = address.rpartition(":")
    limit = timedelta(seconds=timeout_s)
    if rank > 0:
        return dist.TCPStore(host, int(port), count, is_master=False, timeout=limit)
    server = socket.create_server((host, int(port)), backlog=max(128, 2 * count))
    port, listening = server.getsockname()[1], server.detach()
    return dist.TCPStore(
        host, port, count, is_master=True, timeout=limit, master_listen_fd=listening, wait_for_workers=False
    )
