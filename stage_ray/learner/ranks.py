"""The ranks of one learner: processes that share an update, each with its groups and its shard of the model (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from stage_ray.weights.rendezvous import init_process_group


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many this process is.

    Every rank gets the same calls in the same order; those of `Learner` that meet the others say so.

    Example:
        >>> Ranks().rows(8), Ranks(rank=1, count=2).rows(8)
        (slice(0, 8, None), slice(4, 8, None))
    """

    rank: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None

    @classmethod
    def init_process_group(cls, rank: int, count: int, address: str, device: torch.device, timeout_s: float) -> Ranks:
        """Meet the other ranks (`init_process_group`); blocks until all are there."""
        if count == 1:
            return cls()
        init_process_group(rank, count, address, device, timeout_s)
        return cls(rank, count, init_device_mesh(device.type, (count,)))

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This rank's part of rows that belong to whole groups, as many as every other's."""
        share = count // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def shard(self, modules: Sequence[nn.Module], bfloat16: bool) -> None:
        """Keep a part of each module's parameters here; they are gathered for as long as the module runs.

        Gradients are summed over ranks, for every rank's loss is a part of the whole batch's.

        In bfloat16 a layer's weights travel and compute in it, which is half the bytes of a gather, and so do the sums
        between layers. A learner without other ranks keeps those in float32 under autocast: log-probabilities of the
        two differ by the rounding, on average some hundredths of a nat a token.
        """
        if self.mesh is None:
            return
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in modules:
            fully_shard(module, mesh=self.mesh, mp_policy=precision if bfloat16 else MixedPrecisionPolicy())
        for module in modules:
            module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
            module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo knows nothing else

    def all_gather(self, part: Tensor) -> Tensor:
        """Every rank's rows, in the order of ranks: [rows / count, ...] -> [rows, ...]."""
        if self.mesh is None:
            return part
        full_tensor = part.new_empty((part.shape[0] * self.count, *part.shape[1:]))
        dist.all_gather_into_tensor(full_tensor, part.contiguous())
        return full_tensor

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.mesh is not None:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Until every rank is here."""
        if self.mesh is not None:
            dist.barrier()


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every rank must ask.

    Example:
        >>> full_tensor(torch.ones(2)).shape
        torch.Size([2])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_dict(state: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """A state with all shards on the CPU, one tensor gathered after another; empty where it is not to be kept."""
    found = {}
    for name, tensor in state.items():
        full = full_tensor(tensor.detach())
        if keep:
            found[name] = full.cpu()
    return found
