"""Tensor parallelism: processes that are each a whole vLLM engine, with a part of the model.

vLLM's "external launcher" makes them one: every rank gets the same calls in the same order, so all schedule and draw
alike, and they meet inside the model's layers only. Records and weights stay in the process where they are needed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stage_ray.errors import ConfigError
from stage_ray.weights.process_groups import init_process_group


@dataclass(frozen=True, slots=True)
class TensorRanks:
    """Which rank of how many this process is; `unlink_shared_memory` follows once vLLM has started."""

    rank: int = 0
    count: int = 1
    address: str = ""

    def check_heads(self, heads: int, key_heads: int) -> None:
        """Raise a `ConfigError` unless every rank gets as many attention heads as the others, keys repeated or not."""
        possible = [n for n in range(1, heads + 1) if heads % n == 0 and (key_heads % n == 0 or n % key_heads == 0)]
        if self.count not in possible:
            raise ConfigError(
                f"rollout.tensor_parallel = {self.count} cannot share the model's {heads} attention heads ({key_heads} "
                f"of keys and values); take one of {possible}"
            )

    def init_process_group(self, device: torch.device, timeout_s: float, private: str) -> None:
        """Make torch's process group: vLLM takes the one that is there. Its own would listen on every interface.

        ``private`` is a directory that is closed to other users, for sockets at which vLLM unpickles what comes.
        """
        if self.count == 1:
            return
        os.environ["VLLM_RPC_BASE_PATH"] = private
        from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

        # Ray shows each process its own GPU alone, as the first one. The address is also the name of what ranks share
        # on their machine, so that two workers do not share it; vLLM has one name for all.
        ExecutorWithExternalLauncher._distributed_args = lambda _: (f"tcp://{self.address}", self.rank, 0)
        self._unlink_segments()  # of a worker that was killed with the same port
        init_process_group(self.rank, self.count, self.address, device, timeout_s)

    def llm_arguments(self) -> dict[str, Any]:
        """What `vllm.LLM` needs to know."""
        if self.count == 1:
            return {}
        return {
            "tensor_parallel_size": self.count,
            "distributed_executor_backend": "external_launcher",
            "disable_custom_all_reduce": True,  # it wants to see the others' GPUs
        }

    def unlink_shared_memory(self) -> None:
        """Take the names of what ranks share from /dev/shm, so that it ends with them, however they end."""
        if self.count == 1:
            return
        from vllm.distributed.parallel_state import get_tp_group

        dist.barrier(get_tp_group().cpu_group)  # every rank has opened them
        self._unlink_segments()
        broadcaster = get_tp_group().mq_broadcaster
        if self.rank == 0 and broadcaster is not None:
            broadcaster.buffer.shared_memory.unlink()
            broadcaster.buffer.is_creator = False  # else it would unlink it again at its end

    def _unlink_segments(self) -> None:
        port = self.address.rpartition(":")[2]  # vLLM names its segments by the port
        for segment in Path("/dev/shm").glob(f"{port}-*-cpushm_{self.rank}"):
            segment.unlink(missing_ok=True)

    def from_first(self, tensor: Tensor) -> Tensor:
        """What rank 0 has of a tensor on the CPU; others give one of its shape, which is written."""
        if self.count > 1:
            from vllm.distributed.parallel_state import get_tp_group

            dist.broadcast(tensor, src=0, group=get_tp_group().cpu_group)
        return tensor

    def check_agreement(self, tokens: Tensor) -> None:
        """Raise a RuntimeError unless rank 0 drew the same: each rank draws from logits of its own."""
        if self.count == 1:
            return
        first = self.from_first(tokens.clone())
        if not torch.equal(first, tokens):
            raise RuntimeError(
                f"rank {self.rank} of {self.count} drew other tokens than rank 0; do not trust this batch"
            )
