"""This machine: seconds, peak memory, the best that it can do, and the least that a model's work needs of that."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stage_ray.bench.base import Measurement, Trials, Variant
from stage_ray.config.model_sizes import ModelSizes
from stage_ray.policies.devices import compute_dtype, peak_flops


def timed(device: torch.device, work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of a call, and what it returned; a GPU's work counts until it is done."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = work(*arguments)
    wait()
    return time.perf_counter() - start, result


class PeakMemory:
    """How far this process's memory rises from now on: resident on a CPU, allocated by torch on a GPU.

    Linux keeps the peak itself (``VmHWM``), so nothing is missed between two looks. ``ru_maxrss`` would not do: a
    process inherits it from the one that started it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what loading freed and the allocator kept would hide as much
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM starts anew
        self._start = self._peak()

    def rise_mib(self) -> float:
        """MiB between the start and the peak so far."""
        return (self._peak() - self._start) / 2**20

    def total_mib(self) -> float:
        """MiB of the peak itself: what was loaded before counts, and of vLLM the key-value cache that it reserves."""
        return self._peak() / 2**20

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def machine(device: str, *dtypes: str) -> Variant:
    """A variant that measures the machine instead of the code, for `best`."""
    return Variant("machine", probe, {"device": device, "dtypes": sorted({"float32", *dtypes})})


def probe(device: str, dtypes: Sequence[str]) -> Trials:
    """One large square matrix product in each dtype, and one copy larger than any cache; the fastest of three each."""
    place = torch.device(device)
    edge = 8192 if place.type == "cuda" else 2048
    pairs = {name: torch.randn(2, edge, edge, device=place).to(getattr(torch, name)) for name in dtypes}
    source = torch.ones((4 if place.type == "cuda" else 16) * edge * edge, dtype=torch.float32, device=place)
    target = torch.empty_like(source)

    def fastest(work: Callable[..., object], *tensors: torch.Tensor) -> float:
        return min(timed(place, work, *tensors)[0] for _ in range(3))

    while True:
        flops = {name: 2 * edge**3 / fastest(torch.matmul, left, right) for name, (left, right) in pairs.items()}
        yield {**flops, "bytes_per_s": 2 * source.nbytes / fastest(target.copy_, source)}


def best(trials: Sequence[Measurement]) -> Mapping[str, float]:
    """The best over the trials of `machine`: operations a second by dtype, and ``bytes_per_s``."""
    return {name: max(float(trial[name]) for trial in trials) for name in trials[0]}


def throughput(
    model: ModelSizes,
    *,
    images: int,
    seconds: float,
    flops: float,
    device: str,
    dtype: str,
    speed: Mapping[str, float],
    peak_mib: float | None = None,
) -> dict[str, float]:
    """The columns of `stage_ray.bench.command.THROUGHPUT`, for the details of a row.

    Model FLOPs utilisation is against the data sheet of a GPU that is in the table of `peak_flops`, and else against
    the matrix products that `machine` measured, in ``speed``.
    """
    place = torch.device(device)
    possible = peak_flops(place, getattr(torch, dtype)) or speed[dtype]
    told = {"images_per_s": images / seconds, "tokens_per_s": images * model.image_tokens / seconds}
    told["mfu"] = flops / seconds / possible
    return told if peak_mib is None else told | {"peak_mib": peak_mib}


def sampling_limit(
    model: ModelSizes, *, sequences: int, prompt: int, speed: Mapping[str, float], dtype: str
) -> tuple[float, str]:
    """Least seconds of sampling, and what sets them: arithmetic, or reading weights and cache at every token."""
    weights, tokens = model.layers * model.layer + model.head, model.image_tokens
    products = 2 * weights * sequences * (tokens + prompt) / speed[dtype]
    cache = sequences * 2 * model.layers * model.kv_heads * model.head_dim * sum(range(prompt, prompt + tokens))
    memory = (weights * tokens + cache) * getattr(torch, dtype).itemsize / speed["bytes_per_s"]
    which = "matrix products" if products >= memory else "reading weights and key-value cache"
    rates = f"at {speed[dtype] / 1e9:.0f} GFLOP/s, memory {memory:.3g} s at {speed['bytes_per_s'] / 1e9:.1f} GB/s"
    return max(products, memory), f"{which} ({dtype}): products {products:.3g} s {rates}, both measured"


def update_limit(model: ModelSizes, *, positions: int, speed: Mapping[str, float], dtype: str) -> tuple[float, str]:
    """Least seconds of an update: policy forward and backward, reference forward; attention not counted."""
    layers = 8 * model.layers * model.layer * positions / speed[dtype]  # 2 + 4 for the policy, 2 for the reference
    head = 6 * model.head * positions / speed["float32"]  # frozen: its backward needs no weight gradient
    rates = f"at {speed[dtype] / 1e9:.0f} GFLOP/s, head {head:.3g} s in float32 at {speed['float32'] / 1e9:.0f} GFLOP/s"
    return layers + head, f"matrix products: layers {layers:.3g} s in {dtype} {rates}, measured"


def dtype_name(setting: str, device: str) -> str:
    """What ``rollout.dtype`` or ``learner.autocast`` comes to on a device; the learner's heads are float32 anyway."""
    choice = "float32" if setting == "off" else setting
    return str(compute_dtype(choice, torch.device(device))).removeprefix("torch.")
