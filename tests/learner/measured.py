"""What a real forward and backward takes, measured in a process of its own (a `Variant` of stage_ray.bench.base)."""

from __future__ import annotations

import ctypes

import torch

from stage_ray.bench.base import Trials
from stage_ray.bench.machine import PeakMemory
from stage_ray.config import PolicyConfig
from stage_ray.learner.precision import autocast
from stage_ray.policies.janus import JanusPolicy

PROMPT = "a photo of a red circle"
MMAP_THRESHOLD = -3  # of malloc.h: larger tensors go back to the system at once, so that holes do not count


def peak_of_each_form(model: str, images: int, forms: list[tuple[bool, bool]]) -> Trials:
    """Rise of memory over forward and backward, for each (bfloat16, checkpointing); gradients are there before.

    One process measures all forms in turn, those with checkpointing last: the model is loaded once.
    """
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)
    cpu = torch.device("cpu")
    policy = JanusPolicy.load(PolicyConfig(path=model), device=cpu)
    prompt = policy.codec.encode_prompt(PROMPT).conditional

    def passes(count: int, bfloat16: bool) -> None:
        tokens = torch.randint(policy.codebook_size, (count, policy.image_tokens))
        with autocast(bfloat16, cpu):
            found = policy.token_logprobs([prompt] * count, tokens, entropy_grad=False)
        found.logprobs.sum().backward()

    while True:
        rises = {}
        for bfloat16, checkpointing in sorted(forms, key=lambda form: form[1]):
            if checkpointing:
                policy.enable_gradient_checkpointing()
            passes(1, bfloat16)  # makes the gradients, and what the libraries keep
            peak = PeakMemory(cpu)
            passes(images, bfloat16)
            rises[bfloat16, checkpointing] = peak.rise_mib() * 2**20
        yield {"rises": rises, "prompt": len(prompt)}
