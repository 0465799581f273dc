"""Which device a role computes on, and in which dtype."""

from __future__ import annotations

import socket

import torch

from stage_ray.config.flops import BFLOAT16_FLOPS
from stage_ray.errors import ConfigError


def device_for(gpus: float, key: str = "gpus") -> torch.device:
    """A GPU where the role reserved one, else the CPU; ``key`` is the config's, for the message.

    Raises:
        ConfigError: a GPU is reserved and torch cannot use it.
    """
    if gpus > 0 and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
        raise ConfigError(
            f"{key} = {gpus:g} reserves a GPU, but torch {torch.__version__} on {socket.gethostname()} sees none: it "
            f"{built}; set {key}=0, or fix the driver or the installation there (stage-ray doctor looks at both)"
        )
    return torch.device("cuda" if gpus > 0 else "cpu")


def hardware_has_bfloat16(device: torch.device) -> bool:
    """True where the device multiplies bfloat16 matrices itself (AVX-512 BF16 or AMX on a CPU)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """What a config's dtype means on this device: ``auto`` is bfloat16 where the hardware computes in it."""
    if choice != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice]
    return torch.bfloat16 if hardware_has_bfloat16(device) else torch.float32


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense operations a second that a device can do in a dtype, by its data sheet; None where that is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return BFLOAT16_FLOPS.get(torch.cuda.get_device_name(device))
