"""Rollout: guided sampling by each engine against a plain loop with a key-value cache."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stage_ray.bench.base import Bench, Row, median
from stage_ray.bench.baselines import plain_policy, plain_statistics, plain_tokens
from stage_ray.bench.limits import Speed, Work, machine, rollout_dtype, timed
from stage_ray.bench.models import FIFTY_MILLION, SMALL, model_of
from stage_ray.bench.prompts import prompts_of_images
from stage_ray.bench.timing import Measurement, Trial, Variant
from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.config.hardware import usable_cpus
from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageEngine, ImageSequence
from stage_ray.policies.janus.builder import JanusSizes

GUIDANCE, GROUP = 2.0, 8
PLAIN = (
    "plain loop (transformers' DynamicCache, both branches in one batch, softmax and multinomial), "
    "then a second, teacher-forced forward for log-probabilities and entropies"
)
SECOND_FORWARD = "a trainer that runs the policy on these tokens anyway may leave the second forward out of account"


@dataclass(frozen=True, slots=True)
class Case:
    """One model and what is asked of the engines; ``dtype`` is that of ``rollout.dtype``."""

    name: str
    sizes: JanusSizes | None
    images: int
    dtype: str
    targets: Mapping[str, float]
    repeats: int


FULL = (
    Case("shapeworld", None, 64, "float32", {"torch": 3.0, "vllm": 1.5}, repeats=7),
    Case("50m", FIFTY_MILLION, 16, "auto", {"best": 2.5, "vllm": 2.0}, repeats=3),
)
QUICK = (
    Case("shapeworld", None, 8, "float32", FULL[0].targets, repeats=2),
    Case("small", SMALL, 4, "auto", FULL[1].targets, repeats=2),
)


class RolloutBench(Bench):
    """Every engine that is installed, on the shipped model and on a larger one."""

    def rows(self) -> list[Row]:
        """A row for each engine that has a target, and one for the best where that has."""
        engines = ["torch"] + (["vllm"] if importlib.util.find_spec("vllm") else [])
        if "vllm" not in engines:
            self.progress.note("vLLM is not installed here, so its rows are missing")
        rows = []
        for case in QUICK if self.quick else FULL:
            with model_of(case.sizes) as model:
                rows += self.measure(case, model, engines)
        return rows

    def measure(self, case: Case, model: str, engines: Sequence[str]) -> list[Row]:
        """The rows of one case. The plain loop also runs in float32, and the faster of its two is the baseline."""
        dtype = rollout_dtype(case.dtype, self.device)
        options = {"model": model, "images": case.images, "device": self.device}
        plain = [
            Variant(f"plain/{name}", plain_loop, {**options, "dtype": name}) for name in sorted({dtype, "float32"})
        ]
        ours = [Variant(name, engine_loop, {**options, "engine": name, "dtype": dtype}) for name in engines]
        variants = [*plain, *ours, machine(self.device, dtype)]
        trials = self.interleave(f"rollout, {case.name}", variants, repeats=case.repeats)
        seconds = {variant.name: median(trials[variant.name], "seconds") for variant in variants[:-1]}
        baseline = trials[min((variant.name for variant in plain), key=seconds.__getitem__)]
        best = min(engines, key=seconds.__getitem__)
        first, speed = trials[best][0], Speed.of(trials["machine"])
        limit, limit_is = Work.of_checkpoint(model).sampling_limit(
            rows=2 * case.images, prompt=first["prompt"], tokens=first["tokens"], speed=speed, dtype=dtype
        )
        whole, alone = median(baseline, "seconds"), median(baseline, "loop_s")

        def row(claim: str) -> Row:
            ours_s = seconds[best if claim == "best" else claim]
            details = {
                "ratio_without_second_forward": alone / ours_s,
                "loop_alone_s": alone,
                "second_forward_s": whole - alone,
                "images_per_s": case.images / ours_s,
                "ms_per_step": 1e3 * ours_s / first["tokens"],
            }
            return Row(
                name=f"rollout/{case.name}/{claim}",
                target=case.targets[claim],
                baseline=whole,
                ours=ours_s,
                ratio_is="times as fast",
                baseline_is=f"{PLAIN}, {baseline[0]['dtype']}",
                limit=limit,
                limit_is=limit_is,
                details=details,
                notes=(f"{about}; the best engine is {best}" if claim == "best" else about, SECOND_FORWARD),
            )

        about = (
            f"{case.images} images of {first['tokens']} tokens, guidance {GUIDANCE:g}, in {dtype}; pictures are not "
            "decoded by any variant"
        )
        return [row(claim) for claim in case.targets if claim == "best" or claim in engines]


def plain_loop(model: str, images: int, device: str, dtype: str) -> Trial:
    """The baseline: tokens, then their statistics."""
    place = torch.device(device)
    policy = plain_policy(model, device=place, dtype=getattr(torch, dtype))
    prompts = prompts_of_images(policy.codec.encode_prompt, images, GROUP)

    def trial() -> Measurement:
        loop_s, tokens = timed(place, plain_tokens, policy, prompts, GUIDANCE)
        second_s, _ = timed(place, plain_statistics, policy, prompts, tokens)
        return {"seconds": loop_s + second_s, "loop_s": loop_s, "dtype": dtype}

    return trial


def engine_loop(model: str, images: int, device: str, engine: str, dtype: str) -> Trial:
    """Ours: an engine's own sampling of one batch, which records log-probabilities and entropies as it goes."""
    settings = {"engine": engine, "guidance_scale": GUIDANCE, "images_per_batch": images, "dtype": dtype}
    settings |= {"cpus": usable_cpus(), "gpus": float(device == "cuda")}
    policy, rollout = PolicyConfig.model_validate({"path": model}), RolloutConfig.model_validate(settings)
    built = build_engine(policy, rollout, worker="bench")
    assert isinstance(built, ImageEngine)
    prompts = prompts_of_images(built.encode_prompt, images, GROUP)
    sequences = [ImageSequence(ids, seed) for seed, ids in enumerate(prompts)]

    def trial() -> Measurement:
        seconds, drawn = timed(torch.device(device), built.sample, sequences, built.params)
        return {"seconds": seconds, "tokens": drawn.tokens.shape[1], "prompt": len(prompts[0].conditional)}

    return trial
