"""Learner: one STAGE update against the same update with all logits in memory at once; time and peak memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from stage_ray.bench.base import Bench, Row, Trials, Variant, bench_run, interleave, median
from stage_ray.bench.baselines import PlainLearner
from stage_ray.bench.inputs import FIFTY_MILLION, SMALL, equal_prompts, groups_of, model_of
from stage_ray.bench.machine import PeakMemory, best, dtype_name, machine, throughput, timed, update_limit
from stage_ray.config import RunConfig
from stage_ray.config.flops import forward_flops, training_flops
from stage_ray.learner.learner import Learner
from stage_ray.policies.base import Policy
from stage_ray.policies.devices import device_for
from stage_ray.policies.janus.builder import checkpoint_sizes
from stage_ray.records import RolloutGroup, ScoredGroup

GROUPS, GROUP_SIZE = 2, 8
IMAGES = GROUPS * GROUP_SIZE
MICRO_BATCHES = (IMAGES, 4)  # learner.micro_batch_images: the whole batch, as the baseline takes it, and small pieces
PLAIN = "policy and reference forward with float32 logits [B, T, V], log_softmax, gather, entropy; same loss and AdamW"
SHARE = "share of the baseline's peak memory, above what the loaded models take"
STATE = "gradients and AdamW's two moments in float32, which both variants hold"


class LearnerBench(Bench):
    """One update of 16 images: the whole batch at once, and in micro-batches."""

    def rows(self) -> list[Row]:
        """Time and memory of each size of micro-batch against the plain update."""
        name, sizes, repeats = ("small", SMALL, 2) if self.quick else ("50m", FIFTY_MILLION, 5)
        learner = {"gpus": float(self.device == "cuda"), "max_mismatch": None}
        rollout = {"group_size": GROUP_SIZE, "groups_per_step": GROUPS}
        with model_of(sizes) as path:
            runs = {
                n: bench_run(path, rollout=rollout, learner={**learner, "micro_batch_images": n}) for n in MICRO_BATCHES
            }
            dtype, model = dtype_name(runs[IMAGES].learner.autocast, self.device), checkpoint_sizes(path)
            variants = [Variant(f"ours-{n}", update, {"learner": Learner, "run": run}) for n, run in runs.items()]
            variants.append(Variant("plain", update, {"learner": PlainLearner, "run": runs[IMAGES]}))
            variants.append(machine(self.device, dtype))
            trials = interleave(variants, repeats=repeats, progress=self.progress, title=f"learner, {name}")
        plain, speed, state = trials["plain"], best(trials["machine"]), 3 * 4 * model.trained / 2**20
        limit, limit_is = update_limit(model, positions=plain[0]["positions"], speed=speed, dtype=dtype)
        size = f"{IMAGES} images of {model.image_tokens} tokens, V = {model.codes}"
        shared: Any = {"baseline_is": PLAIN, "notes": (f"{size}, autocast {dtype} in all variants",)}
        time: Any = {"ratio_is": "times as fast", "limit": limit, "limit_is": limit_is} | shared
        memory: Any = {"ratio_is": SHARE, "unit": "MiB", "better": "lower", "limit": state, "limit_is": STATE} | shared
        plain_s, plain_mib = median(plain, "seconds"), plain[-1]["rise_mib"]  # the last peak is that of all trials
        prompt = plain[0]["positions"] // IMAGES - model.image_tokens + 1
        flops = IMAGES * (forward_flops(model, prompt) + training_flops(model, prompt))
        same: Any = {"images": IMAGES, "flops": flops, "device": self.device, "dtype": dtype, "speed": speed}
        rows = []
        for n in MICRO_BATCHES:
            case, ours = f"learner/{name}/micro-batch-{n}", trials[f"ours-{n}"]
            ours_s, ours_mib = median(ours, "seconds"), ours[-1]["rise_mib"]
            told = throughput(model, seconds=ours_s, peak_mib=ours[-1]["peak_mib"], **same)
            rows.append(Row(f"{case}/time", 1.5, plain_s, ours_s, details=told, **time))
            rows.append(Row(f"{case}/memory", 0.5, plain_mib, ours_mib, **memory))
        return rows


def update(learner: type[Learner], run: RunConfig) -> Trials:
    """A learner of ours or the plain one; each trial is one update."""
    built, device = learner(run), device_for(run.learner.gpus)
    prompt = equal_prompts(built.policy.codec.encode_prompt)[0][1].conditional
    positions = IMAGES * (len(prompt) + built.policy.image_tokens - 1)
    peak = PeakMemory(device)
    while True:
        seconds, _ = timed(device, built.update, *random_groups(built.policy, built.version))
        memory = {"rise_mib": peak.rise_mib(), "peak_mib": peak.total_mib()}
        yield {"seconds": seconds, "positions": positions} | memory


def random_groups(policy: Policy, version: int, count: int = GROUPS) -> tuple[list[RolloutGroup], list[ScoredGroup]]:
    """Groups of noise with random scores, fixed by ``version``: an update costs the same whatever the pictures."""
    noise = np.random.default_rng(version)
    prompts = [prompt for prompt, _ in equal_prompts(policy.codec.encode_prompt)[:count]]
    tokens = noise.integers(0, policy.codebook_size, (count, GROUP_SIZE, policy.image_tokens)).astype(np.int32)
    images = np.empty((count, GROUP_SIZE, 0, 0, 3), np.uint8)
    groups = groups_of(prompts, tokens, images, codes=policy.codebook_size, version=version)
    scores = noise.random((count, GROUP_SIZE, 1)).astype(np.float32)
    valid, details = np.ones((GROUP_SIZE, 1), bool), tuple(dict[str, Any]() for _ in range(GROUP_SIZE))
    return groups, [ScoredGroup(i, ("geneval",), scores[i], valid, details, 0.0) for i in range(count)]
