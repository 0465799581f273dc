"""Rollout: guided sampling by each engine against a plain loop with a key-value cache."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stage_ray.bench.baselines import plain_policy, plain_statistics, plain_tokens
from stage_ray.bench.limits import Speed, Work, probe_side, synchronize
from stage_ray.bench.models import FIFTY_MILLION, SMALL, ModelSize, model_of
from stage_ray.bench.prompts import equal_prompts
from stage_ray.bench.rows import Row, median
from stage_ray.bench.timing import Facts, Trial, Variant, compare
from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.config.hardware import usable_cpus
from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageEngine, ImageSequence
from stage_ray.observability.progress import Progress
from stage_ray.policies.base import compute_dtype

GUIDANCE, GROUP = 2.0, 8
PLAIN = (
    "plain loop (transformers' DynamicCache, both branches in one batch, softmax and multinomial), "
    "then a second, teacher-forced forward for log-probabilities and entropies"
)
ALONE = "without the second forward, which a trainer that runs the policy on these tokens anyway may not count: "


@dataclass(frozen=True, slots=True)
class Case:
    """One model and what is asked of the engines; ``dtype`` is that of ``rollout.dtype``.

    Example:
        >>> Case("shapeworld", None, 64, "float32", {"torch": 3.0}).targets["torch"]
        3.0
    """

    name: str
    size: ModelSize | None
    images: int
    dtype: str
    targets: Mapping[str, float]
    repeats: int = 5


SHAPEWORLD = Case("shapeworld", None, 64, "float32", {"torch": 3.0, "vllm": 1.5}, repeats=7)
LARGER = Case("50m", FIFTY_MILLION, 16, "auto", {"best": 2.5, "vllm": 2.0}, repeats=3)
QUICK = (
    Case("shapeworld", None, 8, "float32", SHAPEWORLD.targets, repeats=2),
    Case("small", SMALL, 4, "auto", LARGER.targets, repeats=2),
)


def bench(*, device: str, quick: bool, progress: Progress) -> list[Row]:
    """Every engine that is installed, on the shipped model and on a larger one."""
    engines = ["torch"] + (["vllm"] if importlib.util.find_spec("vllm") else [])
    if "vllm" not in engines:
        progress.note("vLLM is not installed here, so its rows are missing")
    rows = []
    for case in QUICK if quick else (SHAPEWORLD, LARGER):
        with model_of(case.size) as model:
            rows += measure(case, model, engines, device, progress)
    return rows


def measure(case: Case, model: str, engines: Sequence[str], device: str, progress: Progress) -> list[Row]:
    """The rows of one case: all sides take turns."""
    dtype = str(compute_dtype(case.dtype, torch.device(device))).removeprefix("torch.")
    common = {"model": model, "images": case.images, "device": device}
    plain = [Variant(f"plain/{name}", plain_side, {**common, "dtype": name}) for name in sorted({dtype, "float32"})]
    ours = [Variant(name, engine_side, {**common, "engine": name, "dtype": dtype}) for name in engines]
    sides = [*plain, *ours, probe_side(device, [dtype, "float32"])]
    facts = compare(sides, repeats=case.repeats, progress=progress, title=f"rollout, {case.name}")
    speed = Speed.of(facts["machine"])
    slow = min((facts[side.name] for side in plain), key=lambda turns: median(turns, "seconds"))
    best = min(engines, key=lambda name: median(facts[name], "seconds"))
    return [
        row_of(case, claim, slow, facts[best if claim == "best" else claim], speed, best)
        for claim in case.targets
        if claim == "best" or claim in engines
    ]


def row_of(case: Case, claim: str, plain: Sequence[Facts], ours: Sequence[Facts], speed: Speed, best: str) -> Row:
    """One claim from the turns of the plain loop and of an engine."""
    first, seconds, alone = ours[0], median(ours, "seconds"), median(plain, "loop_s")
    work: Work = first["work"]
    rows, length = 2 * case.images, first["tokens"]
    limit, limit_is = work.sampling_limit(
        rows=rows, prompt=first["prompt"], tokens=length, speed=speed, dtype=first["dtype"]
    )
    details = {
        "ratio_without_second_forward": alone / seconds,
        "loop_alone_s": alone,
        "second_forward_s": median(plain, "seconds") - alone,
        "images_per_s": case.images / seconds,
        "ms_per_step": 1e3 * seconds / length,
    }
    return Row(
        name=f"rollout/{case.name}/{claim}",
        ratio=median(plain, "seconds") / seconds,
        target=case.targets[claim],
        ratio_is="times as fast",
        baseline_is=f"{PLAIN}, {plain[0]['dtype']}",
        baseline=median(plain, "seconds"),
        ours=seconds,
        limit=limit,
        limit_is=limit_is,
        details=details,
        notes=(
            f"{case.images} images of {length} tokens, guidance {GUIDANCE:g}, in {first['dtype']}; pictures are not "
            "decoded on either side" + (f"; the best engine is {best}" if claim == "best" else ""),
            f"{ALONE}{alone / seconds:.2f} times as fast",
        ),
    )


def plain_side(model: str, images: int, device: str, dtype: str) -> Trial:
    """The baseline: tokens, then their statistics."""
    place = torch.device(device)
    policy = plain_policy(model, device=place, dtype=getattr(torch, dtype))
    pairs = equal_prompts(policy.encode_prompt, -(-images // GROUP))
    prompts = [ids for _, ids in pairs for _ in range(GROUP)][:images]

    def turn() -> Facts:
        start = time.perf_counter()
        tokens = plain_tokens(policy, prompts, GUIDANCE)
        synchronize(place)
        sampled = time.perf_counter()
        plain_statistics(policy, prompts, tokens)
        synchronize(place)
        return {"seconds": time.perf_counter() - start, "loop_s": sampled - start, "dtype": dtype}

    return turn


def engine_side(model: str, images: int, device: str, engine: str, dtype: str) -> Trial:
    """Ours: an engine's own sampling of one wave, which records log-probabilities and entropies as it goes."""
    place = torch.device(device)
    policy = PolicyConfig.model_validate({"path": model})
    work = work_of(policy)
    settings: dict[str, Any] = {"engine": engine, "guidance_scale": GUIDANCE, "images_per_batch": images}
    settings |= {"dtype": dtype, "cpus": usable_cpus(), "gpus": float(place.type == "cuda")}
    built = build_engine(policy, RolloutConfig.model_validate(settings), worker="bench")
    assert isinstance(built, ImageEngine)
    pairs = equal_prompts(built.encode_prompt, -(-images // GROUP))
    rows = [ImageSequence(ids, seed) for seed, ids in enumerate(ids for _, ids in pairs for _ in range(GROUP))][:images]
    prompt = len(rows[0].prompt.conditional)

    def turn() -> Facts:
        start = time.perf_counter()
        wave = built.sample(rows, built.params)
        seconds = time.perf_counter() - start
        tokens = wave.tokens.shape[1]
        return {"seconds": seconds, "tokens": tokens, "prompt": prompt, "dtype": dtype, "work": work}

    return turn


def work_of(policy: PolicyConfig) -> Work:
    """What a model's tokens cost, counted on a copy that holds no numbers."""
    from transformers import JanusForConditionalGeneration

    from stage_ray.policies.janus.codec import JanusCodec

    with torch.device("meta"):
        return Work.of(JanusForConditionalGeneration(JanusCodec.load(policy).config))
