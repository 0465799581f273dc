"""When to compute in bfloat16: only where the hardware does, for elsewhere it is emulated and slow."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from stage_ray.policies.devices import compute_dtype


def uses_bfloat16(setting: Literal["auto", "off", "bfloat16"], device: torch.device) -> bool:
    """What a setting of ``learner.autocast`` comes to on a device."""
    return setting != "off" and compute_dtype(setting, device) is torch.bfloat16


def autocast(bfloat16: bool, device: torch.device) -> AbstractContextManager[object]:
    """A fresh autocast context for one forward pass, or one that does nothing.

    Example:
        >>> with autocast(True, torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if bfloat16 else nullcontext()


def attention(bfloat16: bool, device: torch.device) -> AbstractContextManager[object]:
    """Attention by plain matrix products where torch's fused kernel is the slower one: in bfloat16 on a CPU.

    There the fused backward alone took a third of an update. Holds for forward and backward (which may recompute the
    forward), and for policy and reference alike, so that both round alike.
    """
    return sdpa_kernel(SDPBackend.MATH) if bfloat16 and device.type == "cpu" else nullcontext()
