"""What a real update takes, and loading before it, each in a process of its own (a `Variant` of `bench.base`)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from stage_ray.bench.base import Trials
from stage_ray.bench.machine import PeakMemory
from stage_ray.config import PolicyConfig
from stage_ray.learner.learner import Learner
from stage_ray.learner.ranks import Ranks
from stage_ray.policies.janus import JanusPolicy
from tests.learner_case import tiny_run

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
        with torch.autocast(cpu.type, torch.bfloat16, enabled=bfloat16):
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


def peak_of_loading(model: str, ranks: list[int]) -> Trials:
    """Rise of memory while a learner loads, for each number of ranks; this is the first, the others are made up."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)
    cpu = torch.device("cpu")
    run = tiny_run(Path(model), learner={"gradient_checkpointing": False})
    Learner(run)  # what the libraries keep
    while True:
        rises = {}
        for count in ranks:
            dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
            one_of = Ranks(0, count, init_device_mesh("cpu", (count,)) if count > 1 else None)
            peak = PeakMemory(cpu)
            Learner(run, ranks=one_of)
            rises[count] = peak.rise_mib() * 2**20
            dist.destroy_process_group()
        yield {"rises": rises}
