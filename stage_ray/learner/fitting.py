"""How an update is cut to fit memory: chosen before the first one, or a sentence that names the keys to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from stage_ray.config import LearnerConfig, RunConfig
from stage_ray.config.hardware import usable_memory
from stage_ray.errors import ConfigError
from stage_ray.learner.batch import LearnerError
from stage_ray.learner.memory import MOST_IMAGES, Cut, fillable, first_fit, learner_memory, possible_cuts
from stage_ray.learner.ranks import Ranks
from stage_ray.policies.codec import ImageCodec

GIB = 2**30


def choose_cut(
    run: RunConfig, codec: ImageCodec, ranks: Ranks, device: torch.device, *, bfloat16: bool, reference_bfloat16: bool
) -> Cut:
    """Images of a micro-batch and whether activations are recomputed: the config's, else the first cut that fits.

    Every rank must call it, before it puts anything on its device. For a family without sizes nothing is reckoned.

    Raises:
        ConfigError: none fits; names what needs most, and the keys.
    """
    learner, sizes = run.learner, codec.sizes()
    images, checkpointing = learner.micro_batch_images, learner.gradient_checkpointing
    if images and checkpointing is not None:
        return images, checkpointing
    own = run.rollout.groups_per_step * run.rollout.group_size // ranks.count
    cuts = [(images, False), (images, True)] if images else possible_cuts(min(own, MOST_IMAGES), checkpointing)
    if sizes is None:
        return cuts[0]
    prompt = run.rollout.max_prompt_tokens
    if codec.positions is not None:
        prompt = min(prompt, codec.positions - codec.image_positions)
    memory = partial(
        learner_memory,
        sizes,
        ranks=ranks.count,
        prompt=prompt,
        dtype="bfloat16" if bfloat16 else "float32",
        reference_dtype="bfloat16" if reference_bfloat16 else "float32",
        offload=learner.reference_offload and device.type == "cuda",
        lora=run.policy.lora,
    )
    # The least of all ranks: one that ran other micro-batches than the others would wait for them for ever.
    free = int(ranks.all_gather(torch.tensor([free_memory(run, device)], device=device)).min())
    if chosen := first_fit(cuts, free, memory):
        return chosen
    lines = memory(images=cuts[-1][0], checkpointing=cuts[-1][1])
    raise ConfigError(
        f"learner does not fit: micro-batches of {cuts[-1][0]} image(s) need {sum(lines.values()) / GIB:.1f} GiB, most "
        f"of it {max(lines, key=lambda name: lines[name])}, and {free / GIB:.1f} are free on {device}; "
        + _fix(learner, cuts[-1], bfloat16=bfloat16)
        + ("" if run.policy.lora else ", or train adapters with policy.lora.rank=32")
    )


def free_memory(run: RunConfig, device: torch.device) -> int:
    """Bytes that an update may fill: of a GPU what is free, of a CPU half of all, so that a resumed run cuts alike."""
    if device.type == "cpu":
        return usable_memory() // 2  # sampling and scoring have the other half
    free, total = torch.cuda.mem_get_info(device)
    share = 1.0 if run.rollout.colocated else min(1.0, run.learner.gpus)  # of a GPU that others use at the same time
    return fillable(min(free, int(share * total)))


@contextmanager
def naming_memory(what: str, learner: LearnerConfig, cut: Cut, *, bfloat16: bool) -> Iterator[None]:
    """Raise a LearnerError with the keys to change where torch finds no memory meanwhile."""
    try:
        yield
    except RuntimeError as error:  # a CPU's allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        fix = _fix(learner, cut, bfloat16=bfloat16)
        raise LearnerError(f"{what}: micro-batches of {cut[0]} image(s) do not fit memory ({reason}); {fix}") from error


def _fix(learner: LearnerConfig, cut: Cut, *, bfloat16: bool) -> str:
    images, checkpointing = cut
    fixes = {
        f"learner.micro_batch_images below {images}": images > 1,
        "learner.gradient_checkpointing=true": not checkpointing,
        "learner.autocast=bfloat16": not bfloat16,
        "learner.reference_offload=true": learner.gpus > 0 and not learner.reference_offload,
        f"learner.ranks above {learner.ranks}": True,
    }
    *others, last = [key for key, helps in fixes.items() if helps]
    return f"set {', '.join(others)} or {last}" if others else f"set {last}"
