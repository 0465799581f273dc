"""The ranks of one learner: processes that share an update, each with its groups and its shard of the model (FSDP2)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from stage_ray.weights.process_groups import init_process_group


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which rank this process is, and of how many.

    Invariant: every rank makes the same calls in the same order; all but `shard`, `reshard`, `rows` wait for others.
    """

    rank: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None

    @classmethod
    def init_process_group(cls, rank: int, count: int, address: str, device: torch.device, timeout_s: float) -> Ranks:
        """Join the process group of all ranks; blocks until every rank has."""
        if count == 1:
            return cls()
        init_process_group(rank, count, address, device, timeout_s)
        return cls(rank, count, init_device_mesh(device.type, (count,)))

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what all ranks share."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This rank's equal part of ``count`` groups, or of the images of whole groups."""
        share = count // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def shard(self, modules: Sequence[nn.Module], bfloat16: bool, exact: Collection[nn.Module] = ()) -> None:
        """Keep a shard of each module's parameters here; a module's are gathered while it runs.

        Gradients are summed over ranks, not averaged: every rank's loss is a part of the whole batch's. ``bfloat16`` is
        of gathers, layers and the sums between layers, but not of ``exact`` modules; a single rank keeps those sums in
        float32 under autocast, so log-probabilities differ by rounding, on average some hundredths of a nat.
        """
        if self.mesh is None:
            return
        rounded = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in modules:
            precision = rounded if bfloat16 and module not in exact else MixedPrecisionPolicy()
            fully_shard(module, mesh=self.mesh, mp_policy=precision)
        for module in modules:
            module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
            module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo has no other reduction

    def reshard(self, modules: Sequence[nn.Module]) -> None:
        """Keep shards alone again of what `shard` was given: a forward leaves some whole for a backward to come."""
        for module in modules if self.mesh is not None else ():
            module.reshard()  # type: ignore[operator]

    def part(self, tensor: Tensor) -> tuple[Tensor, list[int]] | None:
        """What this rank stores of a tensor, and where in the whole that begins; None where it stores nothing.

        Of a tensor that is not sharded the first rank stores all. FSDP2 cuts the first dimension as `torch.chunk` does.
        """
        if not isinstance(tensor, DTensor):
            return (tensor, [0] * tensor.dim()) if self.first else None
        local = tensor.to_local()
        begin = self.rank * -(-tensor.shape[0] // self.count)
        return (local, [begin] + [0] * (tensor.dim() - 1)) if local.numel() else None

    def all_gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks, in the order of ranks: [rows / count, ...] -> [rows, ...]."""
        if self.mesh is None:
            return part
        gathered = part.new_empty((part.shape[0] * self.count, *part.shape[1:]))  # every rank's part is as long
        dist.all_gather_into_tensor(gathered, part.contiguous())
        return gathered

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.mesh is not None:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Block until every rank has called it."""
        if self.mesh is not None:
            dist.barrier()


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_dict(
    state: Iterable[tuple[str, Tensor]], *, keep: bool, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A state with all shards on the CPU, gathered one by one and cast to ``dtype``; empty unless it is to ``keep``."""
    found = {}
    for name, tensor in state:
        full = full_tensor(tensor.detach())  # a collective call: also where it is not kept
        if keep:
            found[name] = full.to(dtype=dtype).cpu()
    return found
