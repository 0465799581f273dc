"""What this machine can do at best, measured beside the variants it bounds, and the least that a model's work needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import JanusConfig, JanusForConditionalGeneration

from stage_ray.bench.timing import Measurement, Trial, Variant
from stage_ray.config import RunConfig
from stage_ray.config.paths import resolve_path
from stage_ray.learner.precision import uses_bfloat16
from stage_ray.policies.devices import compute_dtype, device_for

BEST_OF = 3


@dataclass(frozen=True, slots=True)
class Speed:
    """The fastest that was seen: multiply-add operations a second by dtype (two each), and bytes moved a second."""

    flops: Mapping[str, float]
    bytes_per_s: float

    @classmethod
    def of(cls, trials: Sequence[Measurement]) -> Speed:
        """The best over the trials of a `probe`."""
        best = {name: max(float(trial[name]) for trial in trials) for name in trials[0]}
        moved = best.pop("bytes_per_s")
        return cls(best, moved)


def machine(device: str, *dtypes: str) -> Variant:
    """A variant that measures the machine instead of the code, for `Speed`."""
    return Variant("machine", probe, {"device": device, "dtypes": sorted({"float32", *dtypes})})


def probe(device: str, dtypes: Sequence[str]) -> Trial:
    """One large square matrix product in each dtype, and one copy larger than any cache."""
    place = torch.device(device)
    edge = 8192 if place.type == "cuda" else 2048
    pairs = {name: torch.randn(2, edge, edge, device=place).to(getattr(torch, name)) for name in dtypes}
    source = torch.ones(16 * edge * edge, dtype=torch.float32, device=place)
    target = torch.empty_like(source)

    def fastest(work: Callable[..., object], *tensors: torch.Tensor) -> float:
        return min(timed(place, work, *tensors)[0] for _ in range(BEST_OF))

    def trial() -> Measurement:
        flops = {name: 2 * edge**3 / fastest(torch.matmul, left, right) for name, (left, right) in pairs.items()}
        return {**flops, "bytes_per_s": 2 * source.nbytes / fastest(target.copy_, source)}

    return trial


def timed(device: torch.device, work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of a call, and what it returned; a GPU's work counts until it is done."""
    synchronize(device)
    start = time.perf_counter()
    result = work(*arguments)
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that a clock shows its work; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class Work:
    """What a Janus model does for one image token: weights that are multiplied (trained layers, frozen head), and the
    bytes that one token leaves in the key-value cache for each byte of the dtype.
    """

    layers: int
    head: int
    cache: int

    @classmethod
    def of(cls, model: Any) -> Work:
        """Count the matrices of a ``JanusForConditionalGeneration``."""
        core = model.model
        config = core.language_model.config
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return cls(_numbers(core.language_model.layers), _numbers(core.generation_head), cache)

    @classmethod
    def of_checkpoint(cls, path: str) -> Work:
        """Count on a copy that holds no numbers; ``path`` as ``policy.path``, of a model on this machine."""
        with torch.device("meta"):
            return cls.of(JanusForConditionalGeneration(JanusConfig.from_pretrained(resolve_path(path))))

    def sampling_limit(self, *, rows: int, prompt: int, tokens: int, speed: Speed, dtype: str) -> tuple[float, str]:
        """Least seconds of sampling, and what sets them: arithmetic, or reading weights and cache at every token."""
        width = getattr(torch, dtype).itemsize
        weights = self.layers + self.head
        arithmetic = 2 * weights * rows * (tokens + prompt) / speed.flops[dtype]
        cache = rows * self.cache * sum(range(prompt, prompt + tokens))
        moved = (weights * tokens + cache) * width / speed.bytes_per_s
        limit = max(arithmetic, moved)
        which = "matrix products" if arithmetic >= moved else "reading weights and key-value cache"
        return limit, (
            f"{which} ({dtype}): products {arithmetic:.3g} s at {speed.flops[dtype] / 1e9:.0f} GFLOP/s, "
            f"memory {moved:.3g} s at {speed.bytes_per_s / 1e9:.1f} GB/s, both measured"
        )

    def update_limit(self, *, tokens: int, speed: Speed, dtype: str) -> tuple[float, str]:
        """Least seconds of an update: policy forward and backward, reference forward; attention not counted."""
        layers = 8 * self.layers * tokens / speed.flops[dtype]  # 2 + 4 for the policy, 2 for the reference
        head = 6 * self.head * tokens / speed.flops["float32"]  # frozen: its backward needs no weight gradient
        return layers + head, (
            f"matrix products: layers {layers:.3g} s in {dtype} at {speed.flops[dtype] / 1e9:.0f} GFLOP/s, "
            f"head {head:.3g} s in float32 at {speed.flops['float32'] / 1e9:.0f} GFLOP/s, measured"
        )


def rollout_dtype(choice: str, device: str) -> str:
    """What an engine multiplies in, given ``rollout.dtype``."""
    return str(compute_dtype(choice, torch.device(device))).removeprefix("torch.")


def learner_dtype(run: RunConfig) -> str:
    """What the learner multiplies in; its heads are float32 anyway."""
    return "bfloat16" if uses_bfloat16(run.learner.autocast, device_for(run.learner.gpus)) else "float32"


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
