"""The greatest memory of this process since a moment: resident on a CPU, allocated by torch on a GPU."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): resets VmHWM


class PeakMemory:
    """How far memory rose above where it was when this was made.

    Linux keeps the peak itself (``VmHWM``), so nothing is missed between two looks. ``ru_maxrss`` would not do: a
    process inherits it from the one that started it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
        else:
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)  # what loading freed and the allocator kept would hide as much
                CLEAR_REFS.write_text(RESET_PEAK)
            self._start = _resident("VmRSS")

    def rise_mib(self) -> float:
        """MiB between the start and the peak so far."""
        cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else _resident("VmHWM")
        return (peak - self._start) / 2**20


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), flags=re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no {name}")
    return int(found[1]) * 1024
