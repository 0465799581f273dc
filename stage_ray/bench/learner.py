"""Learner: one STAGE update against the same update with all logits in memory at once; time and peak memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stage_ray.bench.baselines import PlainLearner
from stage_ray.bench.limits import Speed, Work, probe_side, synchronize
from stage_ray.bench.memory import PeakMemory
from stage_ray.bench.models import FIFTY_MILLION, SMALL, ModelSize, model_of
from stage_ray.bench.prompts import equal_prompts
from stage_ray.bench.rows import Row, median
from stage_ray.bench.timing import Facts, Trial, Variant, compare
from stage_ray.config import RunConfig
from stage_ray.config.load import validate_config
from stage_ray.learner import Learner
from stage_ray.learner.precision import uses_bfloat16
from stage_ray.observability.progress import Progress
from stage_ray.policies.base import Policy, device_for
from stage_ray.records import RolloutGroup, ScoredGroup

GROUPS, GROUP_SIZE = 2, 8
IMAGES = GROUPS * GROUP_SIZE
CUTS = (IMAGES, 4)  # learner.micro_batch_images: the whole batch, as the baseline takes it, and small pieces
FASTER, LEANER = 1.5, 0.5
PLAIN = "policy and reference forward with float32 logits [B, T, V], log_softmax, gather, entropy; same loss and AdamW"


def bench(*, device: str, quick: bool, progress: Progress) -> list[Row]:
    """One update of 16 images: the whole batch at once, and in micro-batches."""
    size: ModelSize = SMALL if quick else FIFTY_MILLION
    with model_of(size) as model:
        common = {"model": model, "device": device}
        ours = {cut: Variant(f"micro-{cut}", learner_side, {**common, "micro_batch_images": cut}) for cut in CUTS}
        probe = probe_side(device, ["bfloat16", "float32"])
        sides = [Variant("plain", plain_side, common), *ours.values(), probe]
        facts = compare(sides, repeats=2 if quick else 5, progress=progress, title=f"learner, {size.name}")
    speed = Speed.of(facts["machine"])
    return [
        row
        for cut, side in ours.items()
        for row in rows_of(f"learner/{size.name}/micro-batch-{cut}", facts["plain"], facts[side.name], speed)
    ]


def rows_of(name: str, plain: Sequence[Facts], ours: Sequence[Facts], speed: Speed) -> list[Row]:
    """Time and memory of one cut against the plain update."""
    first, work = ours[0], ours[0]["work"]
    limit, limit_is = work.update_limit(tokens=first["positions"], speed=speed, dtype=first["dtype"])
    seconds, plain_s = median(ours, "seconds"), median(plain, "seconds")
    # The peak of the last turn is that of all turns before it, warm-up included.
    peak, plain_peak = ours[-1]["rise_mib"], plain[-1]["rise_mib"]
    state = first["state_mib"]
    note = f"{IMAGES} images of {first['tokens']} tokens, V = {first['codes']}, autocast {first['dtype']} on both sides"
    return [
        Row(
            name=f"{name}/time",
            ratio=plain_s / seconds,
            target=FASTER,
            ratio_is="times as fast",
            baseline_is=PLAIN,
            baseline=plain_s,
            ours=seconds,
            limit=limit,
            limit_is=limit_is,
            details={"images_per_s": IMAGES / seconds},
            notes=(note,),
        ),
        Row(
            name=f"{name}/memory",
            ratio=peak / plain_peak,
            target=LEANER,
            better="lower",
            ratio_is="share of the baseline's peak memory, above what the loaded models take",
            baseline_is=PLAIN,
            baseline=plain_peak,
            ours=peak,
            unit="MiB",
            limit=state,
            limit_is="gradients and AdamW's two moments in float32, which both sides hold",
            details={"ratio_without_this_state": (peak - state) / (plain_peak - state)},
            notes=(note,),
        ),
    ]


def plain_side(model: str, device: str) -> Trial:
    """The baseline's update."""
    learner = PlainLearner(run_of(model, device, IMAGES))
    return _turn(learner, learner.policy, device, {})


def learner_side(model: str, device: str, micro_batch_images: int) -> Trial:
    """Ours."""
    run = run_of(model, device, micro_batch_images)
    learner = Learner(run)
    policy = learner.policy
    numbers = sum(parameter.numel() for parameter in policy.trained_parameters().values())
    dtype = "bfloat16" if uses_bfloat16(run.learner.autocast, device_for(run.learner.gpus)) else "float32"
    facts = {"dtype": dtype, "state_mib": 3 * 4 * numbers / 2**20, "work": Work.of(policy.model)}
    return _turn(learner, policy, device, facts)


def run_of(model: str, device: str, micro_batch_images: int) -> RunConfig:
    """A run on a model, as `Learner` wants it; the algorithm's settings are the defaults."""
    gpus = float(device == "cuda")
    learner = {"micro_batch_images": micro_batch_images, "gpus": gpus, "max_mismatch": None}
    data = {
        "steps": 1000,
        "prompts": {"train": "none"},
        "policy": {"path": model},
        "rollout": {"group_size": GROUP_SIZE, "groups_per_step": GROUPS},
        "rewards": [{"type": "geneval"}],
        "evaluation": {"enabled": False},
        "learner": learner,
    }
    return validate_config(data)


def random_groups(policy: Policy, version: int) -> tuple[list[RolloutGroup], list[ScoredGroup]]:
    """Groups of noise with random scores, fixed by ``version``: what an update costs does not depend on pictures."""
    noise = np.random.default_rng(version)
    groups, scored = [], []
    shape = (GROUP_SIZE, policy.image_tokens)
    for number, (prompt, _) in enumerate(equal_prompts(policy.encode_prompt, GROUPS)):
        tokens = noise.integers(0, policy.codebook_size, shape).astype(np.int32)
        flat = np.full(shape, np.log(policy.codebook_size), np.float32)
        images = np.empty((GROUP_SIZE, 0, 0, 3), np.uint8)
        seeds = tuple(range(GROUP_SIZE))
        groups.append(RolloutGroup(number, prompt, seeds, tokens, -flat, -flat, flat, images, version, "bench", 0.0))
        scores = noise.random((GROUP_SIZE, 1)).astype(np.float32)
        details: tuple[dict[str, Any], ...] = tuple({} for _ in seeds)
        scored.append(ScoredGroup(number, ("geneval",), scores, np.ones(scores.shape, bool), details, 0.0))
    return groups, scored


def _turn(learner: Learner | PlainLearner, policy: Policy, device: str, facts: Facts) -> Trial:
    place = torch.device(device)
    prompt = random_groups(policy, 0)[0][0].prompt.text
    positions = IMAGES * (len(policy.encode_prompt(prompt).conditional) + policy.image_tokens - 1)
    constant = {**facts, "tokens": policy.image_tokens, "codes": policy.codebook_size, "positions": positions}
    peak = PeakMemory(place)

    def turn() -> Facts:
        batch = random_groups(policy, learner.version)
        synchronize(place)
        start = time.perf_counter()
        learner.update(*batch)
        synchronize(place)
        return {**constant, "seconds": time.perf_counter() - start, "rise_mib": peak.rise_mib()}

    return turn
