"""What a real forward and backward takes, measured in a process of its own (a `Variant` of stage_ray.bench.base)."""

from __future__ import annotations

import ctypes

import torch

from stage_ray.bench.base import Trials
from stage_ray.bench.machine import PeakMemory
from stage_ray.config import PolicyConfig
from stage_ray.learner.learner import _enable_checkpointing
from stage_ray.learner.precision import autocast
from stage_ray.policies.janus import JanusPolicy

PROMPT = "a photo of a red circle"
MMAP_THRESHOLD = -3  # of malloc.h: larger tensors go back to the system at once, so that holes do not count


def peak_side(model: str, rows: int, bfloat16: bool, checkpointing: bool) -> Trials:
    """Rise of memory over forward and backward of ``rows`` images; gradients are there before."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)
    cpu = torch.device("cpu")
    policy = JanusPolicy.load(PolicyConfig(path=model), device=cpu)
    if checkpointing:
        _enable_checkpointing(policy.model)
    prompt = policy.encode_prompt(PROMPT).conditional

    def passes(count: int) -> None:
        tokens = torch.randint(policy.codebook_size, (count, policy.image_tokens))
        with autocast(bfloat16, cpu):
            statistics = policy.token_logprobs([prompt] * count, tokens, entropy_grad=False)
        statistics.logprobs.sum().backward()

    while True:
        passes(1)  # makes the gradients, and what the libraries keep
        peak = PeakMemory(cpu)
        passes(rows)
        yield {"rise": peak.rise_mib() * 2**20, "prompt": len(prompt)}
