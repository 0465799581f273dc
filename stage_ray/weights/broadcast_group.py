"""A line between processes: the learner passes one version to all rollout workers at once (gloo on CPUs, NCCL on GPUs).

vLLM has such a transfer too. It loads what it receives at once, so that one that breaks off half-way leaves a model
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

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from stage_ray.records import WeightManifest
from stage_ray.weights.manifest import DTYPES, verify
from stage_ray.weights.rendezvous import keep_to_network_of, store_at

Backend = Literal["gloo", "nccl"]
BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"


class BroadcastFailed(Exception):  # noqa: N818  as WorkerLost
    """A member died, hung or was too slow: which members have the version is unknown. One sentence."""


@dataclass(frozen=True, slots=True)
class GroupMember:
    """One member of a line: the learner is rank 0, where the others meet it.

    Example:
        >>> GroupMember(number=1, address="10.0.0.1:6000", rank=2, count=3, backend="gloo", timeout_s=120.0).rank
        2
    """

    number: int  # of the line: one that is built again has another
    address: str
    rank: int
    count: int
    backend: Backend
    timeout_s: float  # to connect, and again for each version


class BroadcastGroup:
    """This process's end of a line. It stays connected for as long as it is given the same place."""

    def __init__(self) -> None:
        self._member: GroupMember | None = None
        self._group: Any = None
        self._store: dist.TCPStore | None = None

    def open(self, timeout_s: float) -> str:
        """Listen for the members of a new line, as its rank 0; HOST:PORT."""
        self.close()
        host = ray.util.get_node_ip_address()
        self._store = store_at(f"{host}:0", 0, 1, timedelta(seconds=timeout_s))
        return f"{host}:{self._store.port}"

    def send(self, member: GroupMember, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Pass a version on, tensors in the order of its manifest.

        Raises:
            BroadcastFailed: a member may not have it; the group must be built again.
        """
        device = device_of(member.backend)
        self._pass(member, (tensor.detach().to(device).contiguous() for _, tensor in tensors))

    def receive(self, member: GroupMember, manifest: WeightManifest) -> list[tuple[str, Tensor]]:
        """All tensors of a version, in memory of their own, verified.

        Raises:
            BroadcastFailed: as `send`, or there is no memory for it.
            WeightError: what arrived is not what the manifest says.
        """
        device = device_of(member.backend)
        tensors: list[Tensor] = []

        def rooms() -> Iterator[Tensor]:  # where `_pass` finds it out if there is none: one more copy may not fit
            for spec in manifest.tensors:
                tensors.append(torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=device))
                yield tensors[-1]

        self._pass(member, rooms())
        verify(manifest, tensors)
        return [(spec.name, tensor) for spec, tensor in zip(manifest.tensors, tensors, strict=True)]

    def close(self) -> None:
        """Leave the line; the others notice."""
        self._member = self._group = self._store = None

    def _pass(self, member: GroupMember, tensors: Iterable[Tensor]) -> None:
        try:
            if member != self._member:
                self._member, self._group = None, None
                self._group, self._member = _join(member, self._store or _reached(member)), member
            deadline = time.monotonic() + member.timeout_s
            for tensor in tensors:
                if tensor.numel():
                    self._broadcast(tensor.view(-1).view(torch.uint8), deadline - time.monotonic())
        except (RuntimeError, OSError) as error:  # torch's errors of a group are the first
            self.close()
            raise BroadcastFailed(f"rank {member.rank} of {member.count}: {str(error).splitlines()[0]}") from error

    def _broadcast(self, data: Tensor, seconds: float) -> None:
        assert self._member is not None
        limit = timedelta(seconds=seconds)
        if seconds <= 0:
            raise RuntimeError(f"a version took longer than {self._member.timeout_s:g} s")
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = 0, limit
        work = self._group.broadcast([data], options)
        if self._member.backend == "gloo":
            work.wait()  # given a limit, it would leave the operation pending, and `close` wait for that
        else:
            work.wait(limit)


def device_of(backend: str) -> torch.device:
    """Where the bytes must lie that a line carries."""
    return torch.device("cuda" if backend == "nccl" else "cpu")


def _reached(member: GroupMember) -> dist.TCPStore:
    """The store of a line's rank 0, which listens already: if it does not it is dead, and `store_at` would wait."""
    host, _, port = member.address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=member.timeout_s).close()
    return store_at(member.address, member.rank, member.count, timedelta(seconds=member.timeout_s))


def _join(member: GroupMember, at: dist.TCPStore) -> Any:
    """A process group apart from torch's default one, which several ranks of a learner and vLLM have for themselves."""
    limit = timedelta(seconds=member.timeout_s)
    store = dist.PrefixStore("weights", at)
    if member.backend == "gloo":
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # as torch's own code makes them
        options._timeout = limit
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=ray.util.get_node_ip_address())]
        return dist.ProcessGroupGloo(store, member.rank, member.count, options)
    keep_to_network_of(member.address)
    # Read once, here: a deadline is then an error in `wait`, and not the end of the process.
    before = os.environ.get(BLOCKING)
    os.environ[BLOCKING] = "1"
    try:
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = limit
        return dist.ProcessGroupNCCL(store, member.rank, member.count, nccl)
    finally:
        os.environ.pop(BLOCKING)
        os.environ |= {BLOCKING: before} if before is not None else {}
