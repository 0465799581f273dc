"""Checks of the engines: the numbers that they record, sleep and wake, and their speed at Janus-Pro-1B's shapes."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import Tensor

from stage_ray.bench.base import Variant, interleave, median
from stage_ray.bench.gpu_check.base import Figures, Setting, SkippedError, require
from stage_ray.bench.gpu_check.models import model_path
from stage_ray.bench.inputs import TRAIN, equal_prompts
from stage_ray.bench.machine import best, dtype_name, machine, throughput
from stage_ray.bench.rollout import engine_loop, plain_loop
from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.config.flops import sampling_flops
from stage_ray.config.hardware import usable_cpus
from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageEngine
from stage_ray.engines.sampling import gumbel
from stage_ray.observability.progress import Progress
from stage_ray.policies import load_policy
from stage_ray.policies.base import Policy
from stage_ray.policies.janus.builder import checkpoint_sizes
from stage_ray.policies.logprobs import token_logprobs
from stage_ray.records import RECORDED, RolloutGroup, RolloutRequest
from stage_ray.samplers import Context, process_logits

GROUPS, GROUP_SIZE = 2, 4
# Of an engine's dtype: the least share of tokens that a float32 forward draws too, and the greatest mean difference of
# what is recorded of each, nats. In float32 only the order of sums differs.
LIMITS = {torch.float32: (0.99, 2e-3), torch.bfloat16: (0.7, 0.15)}


def start_engine(setting: Setting, engine: str, dtype: str, *, colocated: bool = False) -> ImageEngine:
    """An engine on the exact model."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise SkippedError("vLLM is not installed here: make install VARIANT=gpu")
    rollout = {
        "engine": engine,
        "dtype": dtype,
        "guidance_scale": 3.0,
        "images_per_batch": GROUPS * GROUP_SIZE,
        "max_prompt_tokens": 64,
        "gpus": 0.5 if setting.device == "cuda" else 0.0,
        "cpus": usable_cpus(),
        "colocated": colocated,
    }
    policy = PolicyConfig.model_validate({"path": model_path(setting, "exact")})
    return build_engine(policy, RolloutConfig.model_validate(rollout), worker="check")


def draw(engine: ImageEngine) -> list[RolloutGroup]:
    """The same groups every time, as long as the weights are the same; their prompts are of several lengths."""
    prompts = [prompt for prompt, _ in equal_prompts(engine.encode_prompt, TRAIN)]
    seeds = [tuple(range(10 * n, 10 * n + GROUP_SIZE)) for n in range(GROUPS)]
    return engine.generate([RolloutRequest(n, prompts[n], seeds[n]) for n in range(GROUPS)])


def parity(setting: Setting, figures: Figures, engine: str, dtype: str) -> None:
    """An engine's tokens and records against a teacher-forced float32 forward, before and after a weight update."""
    built = start_engine(setting, engine, dtype)
    policy = PolicyConfig.model_validate({"path": model_path(setting, "exact")})
    teacher = load_policy(policy, device=torch.device(setting.device))
    groups = draw(built)
    figures |= compare(teacher, built, groups, "before")
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.trained_parameters().values():
            change = torch.randn(parameter.shape, generator=noise).to(parameter.device)
            parameter.add_(0.1 * parameter.abs().mean() * change)
    weights = ((name, parameter.detach().cpu()) for name, parameter in teacher.trained_parameters().items())
    built.load_weights(1, weights)
    later = draw(built)
    require({group.policy_version for group in later} == {1}, "groups after the update are not of version 1")
    same = all((old.tokens == new.tokens).all() for old, new in zip(groups, later, strict=True))
    require(not same, "the update changed no token")
    figures |= compare(teacher, built, later, "after")
    share, nats = LIMITS[built.dtype]
    for name, value in figures.items():
        good = value >= share if name.endswith("same_tokens") else value <= nats
        require(good, f"{name} is {value:.4g}; the limit for {built.dtype} is {share} of tokens, {nats} nats")


@torch.no_grad()
def compare(teacher: Policy, engine: ImageEngine, groups: Sequence[RolloutGroup], when: str) -> Figures:
    """Share of tokens that the teacher draws too, and mean absolute differences of the four records, nats."""
    device = teacher.model.get_parameter(next(iter(teacher.trained_parameters()))).device
    tokens = torch.cat([torch.from_numpy(group.tokens).long() for group in groups]).to(device)  # [B, T]
    seeds = torch.tensor([seed for group in groups for seed in group.seeds], device=device)
    ids = [engine.encode_prompt(group.prompt.drawn_text) for group in groups for _ in group.seeds]
    branches = [[one.conditional for one in ids], [one.unconditional for one in ids]]
    conditional, unconditional = (teacher.image_logits(branch, tokens).flatten(0, 1) for branch in branches)
    count, steps = tokens.shape
    positions = torch.arange(steps, device=device).repeat(count)  # [B * T], as the logits
    context = Context(positions, tokens.repeat_interleave(steps, dim=0))
    guided = process_logits(conditional, unconditional, engine.params, context)
    noise = gumbel(seeds.repeat_interleave(steps), positions, guided.shape[-1])
    drawn = (guided + noise).argmax(dim=-1)
    plain, chosen = (token_logprobs(logits, tokens.flatten()) for logits in (conditional, guided))
    ours = (plain.logprobs, chosen.logprobs, plain.entropy, chosen.entropy)  # in the order of RECORDED

    def difference(name: str, mine: Tensor) -> float:
        theirs = torch.cat([torch.from_numpy(getattr(group, name)) for group in groups]).to(device)
        return float((theirs.flatten() - mine).abs().mean())

    found = {f"{when}_same_tokens": float((drawn == tokens.flatten()).float().mean())}
    pairs = zip(RECORDED, ours, strict=True)
    found |= {f"{when}_{name}_nats": difference(name, mine) for name, mine in pairs}
    require(all(map(math.isfinite, found.values())), f"records {when} the update are not finite: {found}")
    return found


def sleep(setting: Setting, figures: Figures, engine: str) -> None:
    """An engine that sleeps frees a GPU's memory; awake again it has it back and draws what it drew before."""
    cuda = setting.device == "cuda"
    if engine == "vllm" and not cuda:
        raise SkippedError("vLLM sleeps on GPUs only")
    built = start_engine(setting, engine, "auto", colocated=True)
    first = draw(built)
    figures["awake_mib"] = used_mib(setting)
    built.sleep()
    figures["asleep_mib"] = used_mib(setting)
    again = draw(built)
    figures["awake_again_mib"] = used_mib(setting)
    same = all((old.tokens == new.tokens).all() for old, new in zip(first, again, strict=True))
    require(same, "after it slept, the engine draws other tokens")
    if cuda:  # a CPU has nothing to free
        weights = sum(map(math.prod, built.weight_shapes().values())) * built.dtype.itemsize / 2**20
        awake, asleep, later = figures.values()
        require(awake - asleep >= 0.9 * weights, f"sleep freed {awake - asleep:.0f} MiB; weights are {weights:.0f}")
        require(abs(later - awake) <= 64 + 0.1 * awake, f"{awake:.0f} MiB before the sleep, {later:.0f} MiB after it")


def used_mib(setting: Setting) -> float:
    """Memory in use: of the whole GPU, whoever allocated it; on a CPU, this process's."""
    if setting.device == "cuda":
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20
    return float(psutil.Process().memory_info().rss / 2**20)


def speed(setting: Setting, figures: Figures) -> None:
    """The engine against a loop in transformers' style, each in a process of its own, at Janus-Pro-1B's shapes."""
    path, images = model_path(setting, "large"), 4 if setting.small else 16
    model, dtype = checkpoint_sizes(path), dtype_name("auto", setting.device)
    engine = "vllm" if importlib.util.find_spec("vllm") else "torch"
    options = {"model": path, "images": images, "device": setting.device, "dtype": dtype}
    ours, plain = Variant("engine", engine_loop, {**options, "engine": engine}), Variant("hf", plain_loop, options)
    probe = machine(setting.device, dtype)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        quiet = Progress(Console(file=nowhere))
        trials = interleave([ours, plain, probe], repeats=1, progress=quiet, title="speed")
    flops = 2 * images * sampling_flops(model, trials["engine"][0]["prompt"])  # both branches
    same: Any = {"images": images, "flops": flops, "device": setting.device, "dtype": dtype}
    same["speed"] = best(trials["machine"])
    for name in ("engine", "hf"):
        seconds, peak = median(trials[name], "seconds"), median(trials[name], "peak_mib")
        told = throughput(model, seconds=seconds, peak_mib=peak, **same)
        figures |= {f"{name}_{what}": value for what, value in told.items()}
    figures["times_as_fast"] = median(trials["hf"], "seconds") / median(trials["engine"], "seconds")
