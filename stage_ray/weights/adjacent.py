"""Tensors one behind the other in memory, so that a chunk of a version is one array: Ray copies that at full speed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes: each begins where torch would let it begin


def aligned(nbytes: int) -> int:
    """So many bytes, rounded up to where the next tensor begins."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def lay_out(parameters: Iterable[nn.Parameter]) -> None:
    """Move parameters of one device into memory that they share, in their order and one at a time; values stay."""
    parameters = list(parameters)
    starts = [0, *accumulate(aligned(parameter.nbytes) for parameter in parameters)]
    device = parameters[0].device if parameters else None
    memory = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
    for parameter, start in zip(parameters, starts, strict=False):
        own = memory[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        own.copy_(parameter.detach())
        parameter.data = own


def joined(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> tuple[Tensor, list[Tensor], list[int]]:
    """The bytes of tensors, cast to ``dtype``, on the CPU: uint8 [bytes]; the tensors in them, and where each begins.

    Of tensors of `lay_out` that need no cast they are a view, from a GPU one copy; others are copied one by one.
    """
    sizes = [tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors]
    starts = [0, *accumulate(map(aligned, sizes))][: len(tensors)]
    end = max((start + size for start, size in zip(starts, sizes, strict=True)), default=0)
    if tensors and _adjacent(tensors, starts, dtype):
        storage, begin = tensors[0].untyped_storage(), _first_byte(tensors[0])
        memory = torch.empty(0, dtype=torch.uint8, device=tensors[0].device).set_(storage)[begin : begin + end].cpu()
    else:
        memory = torch.zeros(end, dtype=torch.uint8)
        for tensor, start, size in zip(tensors, starts, sizes, strict=True):
            memory[start : start + size].view(dtype or tensor.dtype).copy_(tensor.reshape(-1))
    inside = [
        memory[start : start + size].view(dtype or tensor.dtype).view(tensor.shape)
        for tensor, start, size in zip(tensors, starts, sizes, strict=True)
    ]
    return memory, inside, starts


def _adjacent(tensors: Sequence[Tensor], starts: Sequence[int], dtype: torch.dtype | None) -> bool:
    """Whether tensors lie at ``starts`` of one memory already, as they are to travel."""
    storage, begin = tensors[0].untyped_storage().data_ptr(), _first_byte(tensors[0])
    return all(
        tensor.untyped_storage().data_ptr() == storage
        and _first_byte(tensor) == begin + start
        and tensor.is_contiguous()
        and dtype in (None, tensor.dtype)
        for tensor, start in zip(tensors, starts, strict=True)
    )


def _first_byte(tensor: Tensor) -> int:
    """Where a tensor begins in its storage."""
    return int(tensor.storage_offset()) * tensor.element_size()
