"""Rollout: guided sampling by each engine against a plain loop with a key-value cache."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch

from stage_ray.bench.base import Bench, Row, Trials, Variant, interleave, median
from stage_ray.bench.baselines import plain_logprobs, plain_policy, plain_tokens
from stage_ray.bench.inputs import FIFTY_MILLION, SMALL, equal_prompts, model_of
from stage_ray.bench.machine import PeakMemory, best, dtype_name, machine, sampling_limit, throughput, timed
from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.config.flops import sampling_flops
from stage_ray.config.hardware import usable_cpus
from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageSequence
from stage_ray.policies.codec import PromptIds
from stage_ray.policies.janus.builder import JanusSizes, checkpoint_sizes

GUIDANCE, GROUP = 2.0, 8
PLAIN = (
    "plain loop (DynamicCache, both branches in one batch, multinomial), then a second forward for log-probabilities"
)


@dataclass(frozen=True, slots=True)
class Case:
    """One model and what is asked of the engines; ``dtype`` is that of ``rollout.dtype``."""

    name: str
    sizes: JanusSizes | None
    images: int
    dtype: str
    targets: Mapping[str, float]  # of each engine, and of the best
    repeats: int


SHAPEWORLD, LARGER = {"torch": 2.5, "vllm": 1.5}, {"best": 2.5, "vllm": 2.0}
FULL = (Case("shapeworld", None, 64, "float32", SHAPEWORLD, 7), Case("50m", FIFTY_MILLION, 16, "auto", LARGER, 3))
QUICK = (Case("shapeworld", None, 8, "float32", SHAPEWORLD, 2), Case("small", SMALL, 4, "auto", LARGER, 2))


class RolloutBench(Bench):
    """Every engine that is installed, on the shipped model and on a larger one."""

    def rows(self) -> list[Row]:
        """A row for each engine that has a target, and one for the best where that has."""
        engines, rows = ["torch"], list[Row]()
        if importlib.util.find_spec("vllm"):
            engines.append("vllm")
        else:
            self.progress.note("vLLM is not installed here, so its rows are missing")
        for case in QUICK if self.quick else FULL:
            with model_of(case.sizes) as model:
                rows += self.measure(case, model, engines)
        return rows

    def measure(self, case: Case, path: str, engines: Sequence[str]) -> list[Row]:
        """The rows of one case. The plain loop also runs in float32, and the faster of its two is the baseline."""
        dtype, model = dtype_name(case.dtype, self.device), checkpoint_sizes(path)
        options = {"model": path, "images": case.images, "device": self.device}
        plain = [Variant(name, plain_loop, {**options, "dtype": name}) for name in sorted({dtype, "float32"})]
        ours = [Variant(name, engine_loop, {**options, "dtype": dtype, "engine": name}) for name in engines]
        variants = [*plain, *ours, machine(self.device, dtype)]
        title = f"rollout, {case.name}"
        trials = interleave(variants, repeats=case.repeats, progress=self.progress, title=title)
        seconds = {variant.name: median(trials[variant.name], "seconds") for variant in (*plain, *ours)}
        baseline = min((variant.name for variant in plain), key=seconds.__getitem__)
        fastest = min(engines, key=seconds.__getitem__)
        peaks = {name: trials[name][-1]["peak_mib"] for name in engines}  # the last peak is that of all trials
        whole, alone, seconds["best"] = seconds[baseline], median(trials[baseline], "loop_s"), seconds[fastest]
        prompt, speed = trials[fastest][0]["prompt"], best(trials["machine"])
        limit, limit_is = sampling_limit(model, sequences=2 * case.images, prompt=prompt, speed=speed, dtype=dtype)
        size = f"{case.images} images of {model.image_tokens} tokens, guidance {GUIDANCE:g}, in {dtype}"
        note = f"{size}; pictures are not decoded by any variant; the best engine is {fastest}"
        words = ("times as fast", f"{PLAIN}, {baseline}")
        limited: Any = {"limit": limit, "limit_is": limit_is, "notes": (note,)}
        peaks["best"] = peaks[fastest]
        flops = 2 * case.images * sampling_flops(model, prompt)  # both branches
        same: Any = {"images": case.images, "flops": flops, "device": self.device, "dtype": dtype, "speed": speed}
        rows = []
        for claim, target in case.targets.items():
            if ours_s := seconds.get(claim):  # an engine that is not installed has no row
                details = {
                    "ratio_without_second_forward": alone / ours_s,
                    "loop_alone_s": alone,
                    "second_forward_s": whole - alone,
                    "ms_per_step": 1e3 * ours_s / model.image_tokens,
                } | throughput(model, seconds=ours_s, peak_mib=peaks[claim], **same)
                name = f"rollout/{case.name}/{claim}"
                rows.append(Row(name, target, whole, ours_s, *words, details=details, **limited))
        return rows


def prompts_of(encode: Callable[[str], PromptIds], images: int) -> list[PromptIds]:
    """The prompt of each image, `GROUP` images a prompt."""
    pairs = cycle(equal_prompts(encode))
    return list(islice((ids for _, ids in pairs for _ in range(GROUP)), images))


def plain_loop(model: str, images: int, device: str, dtype: str) -> Trials:
    """The baseline: tokens, then their log-probabilities."""
    place = torch.device(device)
    policy = plain_policy(model, device=place, dtype=getattr(torch, dtype))
    prompts, peak = prompts_of(policy.codec.encode_prompt, images), PeakMemory(place)
    while True:
        loop_s, tokens = timed(place, plain_tokens, policy, prompts, GUIDANCE)
        second_s, _ = timed(place, plain_logprobs, policy, prompts, tokens)
        yield {"seconds": loop_s + second_s, "loop_s": loop_s, "peak_mib": peak.total_mib()}


def engine_loop(model: str, images: int, device: str, dtype: str, engine: str) -> Trials:
    """Ours: an engine's own sampling of one batch, which records log-probabilities and entropies as it goes."""
    settings = {"engine": engine, "guidance_scale": GUIDANCE, "images_per_batch": images, "dtype": dtype}
    settings |= {"cpus": usable_cpus(), "gpus": float(device == "cuda")}
    policy = PolicyConfig.model_validate({"path": model})
    built = build_engine(policy, RolloutConfig.model_validate(settings), worker="bench")
    sequences = [ImageSequence(ids, seed) for seed, ids in enumerate(prompts_of(built.encode_prompt, images))]
    peak, prompt = PeakMemory(torch.device(device)), len(sequences[0].prompt.conditional)
    while True:
        seconds, _ = timed(torch.device(device), built.sample, sequences, built.params)
        yield {"seconds": seconds, "prompt": prompt, "peak_mib": peak.total_mib()}
