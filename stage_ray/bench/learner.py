"""Learner: one STAGE update against the same update with all logits in memory at once; time and peak memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from stage_ray.bench.base import Bench, Row, bench_run, median
from stage_ray.bench.baselines import PlainLearner
from stage_ray.bench.limits import Speed, Work, learner_dtype, machine, timed
from stage_ray.bench.memory import PeakMemory
from stage_ray.bench.models import FIFTY_MILLION, SMALL, model_of
from stage_ray.bench.prompts import equal_prompts, groups_of
from stage_ray.bench.timing import Measurement, Trial, Variant
from stage_ray.config import RunConfig
from stage_ray.learner.learner import Learner
from stage_ray.policies.base import Policy
from stage_ray.policies.devices import device_for
from stage_ray.records import RolloutGroup, ScoredGroup

GROUPS, GROUP_SIZE = 2, 8
IMAGES = GROUPS * GROUP_SIZE
MICRO_BATCHES = (IMAGES, 4)  # learner.micro_batch_images: the whole batch, as the baseline takes it, and small pieces
FASTER, LEANER = 1.5, 0.5
PLAIN = "policy and reference forward with float32 logits [B, T, V], log_softmax, gather, entropy; same loss and AdamW"


class LearnerBench(Bench):
    """One update of 16 images: the whole batch at once, and in micro-batches."""

    def rows(self) -> list[Row]:
        """Time and memory of each size of micro-batch against the plain update."""
        name, sizes = ("small", SMALL) if self.quick else ("50m", FIFTY_MILLION)
        with model_of(sizes) as model:
            runs = {images: run_of(model, self.device, images) for images in MICRO_BATCHES}
            plain = Variant("plain", update, {"learner": PlainLearner, "run": runs[IMAGES]})
            ours = [Variant(f"ours-{images}", update, {"learner": Learner, "run": run}) for images, run in runs.items()]
            dtype, work = learner_dtype(runs[IMAGES]), Work.of_checkpoint(model)
            variants = [plain, *ours, machine(self.device, dtype)]
            trials = self.interleave(f"learner, {name}", variants, repeats=2 if self.quick else 5)
        first = trials["plain"][0]
        limit, limit_is = work.update_limit(tokens=first["positions"], speed=Speed.of(trials["machine"]), dtype=dtype)
        note = f"{IMAGES} images of {first['tokens']} tokens, V = {first['codes']}, autocast {dtype} in all variants"
        rows = []
        for images in MICRO_BATCHES:
            seconds, plain_s = (median(trials[variant], "seconds") for variant in (f"ours-{images}", "plain"))
            # The peak of the last trial is that of all trials before it, warm-up included.
            peak, plain_peak = (trials[variant][-1]["rise_mib"] for variant in (f"ours-{images}", "plain"))
            state = first["state_mib"]
            time = Row(
                name=f"learner/{name}/micro-batch-{images}/time",
                target=FASTER,
                baseline=plain_s,
                ours=seconds,
                ratio_is="times as fast",
                baseline_is=PLAIN,
                limit=limit,
                limit_is=limit_is,
                details={"images_per_s": IMAGES / seconds},
                notes=(note,),
            )
            memory = Row(
                name=f"learner/{name}/micro-batch-{images}/memory",
                target=LEANER,
                baseline=plain_peak,
                ours=peak,
                ratio_is="share of the baseline's peak memory, above what the loaded models take",
                baseline_is=PLAIN,
                unit="MiB",
                better="lower",
                limit=state,
                limit_is="gradients and AdamW's two moments in float32, which both variants hold",
                details={"ratio_without_this_state": (peak - state) / (plain_peak - state)},
                notes=(note,),
            )
            rows += [time, memory]
        return rows


def update(learner: type[Learner] | type[PlainLearner], run: RunConfig) -> Trial:
    """A learner of ours or the plain one; each trial is one update."""
    built, device = learner(run), device_for(run.learner.gpus)
    policy = built.policy
    trained = sum(parameter.numel() for parameter in policy.trained_parameters().values())
    prompt = equal_prompts(policy.codec.encode_prompt, 1)[0][1].conditional
    constant = {
        "tokens": policy.image_tokens,
        "codes": policy.codebook_size,
        "positions": IMAGES * (len(prompt) + policy.image_tokens - 1),
        "state_mib": 3 * 4 * trained / 2**20,
    }
    peak = PeakMemory(device)

    def trial() -> Measurement:
        seconds, _ = timed(device, built.update, *random_groups(policy, built.version))
        return {**constant, "seconds": seconds, "rise_mib": peak.rise_mib()}

    return trial


def run_of(model: str, device: str, micro_batch_images: int) -> RunConfig:
    """A run on a model, as `Learner` wants it; the algorithm's settings are the defaults."""
    gpus = float(device == "cuda")
    return bench_run(
        model,
        rollout={"group_size": GROUP_SIZE, "groups_per_step": GROUPS},
        learner={"micro_batch_images": micro_batch_images, "gpus": gpus, "max_mismatch": None},
    )


def random_groups(policy: Policy, version: int) -> tuple[list[RolloutGroup], list[ScoredGroup]]:
    """Groups of noise with random scores, fixed by ``version``: what an update costs does not depend on pictures."""
    noise = np.random.default_rng(version)
    prompts = [prompt for prompt, _ in equal_prompts(policy.codec.encode_prompt, GROUPS)]
    tokens = noise.integers(0, policy.codebook_size, (GROUPS, GROUP_SIZE, policy.image_tokens)).astype(np.int32)
    images = np.empty((GROUPS, GROUP_SIZE, 0, 0, 3), np.uint8)
    groups = groups_of(prompts, tokens, images, codes=policy.codebook_size, version=version)
    scores = noise.random((GROUPS, GROUP_SIZE, 1)).astype(np.float32)
    details: tuple[dict[str, Any], ...] = ({},) * GROUP_SIZE
    scored = [
        ScoredGroup(group.group_id, ("geneval",), score, np.ones(score.shape, bool), details, 0.0)
        for group, score in zip(groups, scores, strict=True)
    ]
    return groups, scored
