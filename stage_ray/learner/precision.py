"""When to compute in bfloat16: only where the hardware does, for elsewhere it is emulated and slow."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch


def hardware_has_bfloat16(device: torch.device) -> bool:
    """True where the device multiplies bfloat16 matrices itself (AVX-512 BF16 or AMX on a CPU)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(setting: Literal["auto", "off", "bfloat16"], device: torch.device) -> AbstractContextManager[object]:
    """A fresh autocast context for ``learner.autocast``, or one that does nothing.

    Example:
        >>> with autocast("bfloat16", torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
    """
    if setting == "off" or (setting == "auto" and not hardware_has_bfloat16(device)):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
