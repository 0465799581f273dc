"""Seconds of each role's work: limits of the hardware, times the share of it that such code is known to reach.

The shares are assumptions, not measurements on your machine: `ASSUMED` says where each comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stage_ray.commands.planning.gpus import Gpu
from stage_ray.commands.planning.memory import BFLOAT16, FLOAT32, weight_bytes, width
from stage_ray.commands.planning.models import ModelSizes

PROMPT_TOKENS = 32  # of a GenEval prompt in Janus-Pro's template; memory is reserved for more
PRODUCTS, MEMORY, NETWORK, HOST_TO_GPU = 0.4, 0.6, 0.8, 0.4
TOKEN_OVERHEAD_S = 0.004
RAY_NODE_GBS = 5.6
HOST_COPY_GBS, HOST_READ_GBS = 10.0, 200.0
DRIVER_S = 0.08e-3
REWARD_FLOPS = 1e12

ASSUMED = {
    "matrix products": f"{PRODUCTS:.0%} of the datasheet, as FSDP2 trains Llama 3.1 8B on H100 (arXiv 2410.06511)",
    "GPU memory": f"{MEMORY:.0%} of the datasheet while sampling",
    "NCCL": f"{NETWORK:.0%} of the datasheet",
    "engine": f"{1e3 * TOKEN_OVERHEAD_S:g} ms a token beside the model (bench rollout, on a CPU)",
    "Ray": f"{RAY_NODE_GBS} GB/s out of one node (45 Gbit/s over a 100 Gbit/s card: ray-project/ray issue 42632)",
    "host memory": f"{HOST_COPY_GBS:g} GB/s a core copies, {HOST_READ_GBS:g} GB/s all cores read; "
    f"pageable copies to and from a GPU at {HOST_TO_GPU:.0%} of PCIe",
    "driver": f"{1e3 * DRIVER_S:g} ms a group (bench pipeline, 64 rollout and 16 reward workers)",
    "scorers": f"{REWARD_FLOPS / 1e12:g} TFLOP a picture in float32: Mask2Former Swin-S once, CLIP ViT-L/14 on crops",
    "prompts": f"{PROMPT_TOKENS} tokens; memory is kept for longer ones",
}


@dataclass(frozen=True, slots=True)
class UpdateTime:
    """Seconds of one update on every rank; arithmetic and collectives overlap, so the longer one counts.

    Example:
        >>> UpdateTime(compute=2.0, collectives=0.5, optimizer=0.1).seconds
        2.1
    """

    compute: float
    collectives: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return max(self.compute, self.collectives) + self.optimizer


def wave_s(model: ModelSizes, gpu: Gpu, *, images: int, dtype: str) -> float:
    """One wave: two sequences an image drawn token by token, then decoded to pixels.

    Products, or reading weights and cache for every token (the limit that `stage-ray bench rollout` measures against),
    the engine's own time a token, and the decoder's convolutions at float32's rate.
    """
    limit = sampling_limit(model, rows=2 * images, flops=_flops(gpu, dtype), moved=_moved(gpu), dtype=dtype)
    return limit + model.image_tokens * TOKEN_OVERHEAD_S + images * model.decode_flops / _flops(gpu, "float32")


def sampling_limit(model: ModelSizes, *, rows: int, flops: float, moved: float, dtype: str) -> float:
    """Least seconds of drawing ``rows`` sequences, at ``flops`` operations and ``moved`` bytes a second."""
    tokens, weights = model.image_tokens, model.decoder + model.head
    cache = rows * model.cache * sum(range(PROMPT_TOKENS, PROMPT_TOKENS + tokens))
    arithmetic = 2 * weights * rows * (tokens + PROMPT_TOKENS) / flops
    return max(arithmetic, (weights * tokens + cache) * width(dtype) / moved)


def update_limit(model: ModelSizes, *, tokens: int, flops: float, float32_flops: float) -> float:
    """Least seconds of an update: policy forward and backward, reference forward; the frozen head in float32."""
    return 8 * model.decoder * tokens / flops + 6 * model.head * tokens / float32_flops


def score_s(gpu: Gpu, images: int) -> float:
    """Scoring pictures on one GPU."""
    return images * REWARD_FLOPS / _flops(gpu, "float32")


def collective_gbs(gpu: Gpu, ranks: int, gpus_per_node: int) -> float:
    """What one rank's ring sends, GB/s: NVLink within a node; between nodes each GPU's own network card."""
    link = gpu.peer_gbs if ranks <= gpus_per_node else min(gpu.peer_gbs, gpu.network_gbs)
    return NETWORK * link


def collective_bytes(model: ModelSizes, *, ranks: int, micro_batches: int, dtype: str) -> int:
    """Bytes that each rank sends in an update (FSDP2, rings): every micro-batch gathers the policy's layers twice
    (forward, backward) and the reference's once, and reduces float32 gradients once; (R - 1) / R of each.

    The root (embeddings) is gathered once a pass and kept for the backward.
    """
    if ranks == 1:
        return 0
    layers = model.layers * model.layer
    gathered = width(dtype) * (3 * layers + 2 * model.embedding)
    return micro_batches * (gathered + FLOAT32 * model.trained) * (ranks - 1) // ranks


def update_time(
    model: ModelSizes,
    gpu: Gpu,
    *,
    images: int,
    ranks: int,
    rows: int,
    dtype: str,
    checkpointing: bool,
    gpus_per_node: int,
) -> UpdateTime:
    """One update of ``images`` in all, ``rows`` a micro-batch.

    Arithmetic is `update_limit`; checkpointing runs the layers' forward once more. AdamW reads weight, gradient
    and two moments and writes three of them.
    """
    share = images // ranks
    tokens = share * (PROMPT_TOKENS + model.image_tokens - 1)
    flops = _flops(gpu, dtype)
    compute = update_limit(model, tokens=tokens, flops=flops, float32_flops=_flops(gpu, "float32"))
    if checkpointing:
        compute += 2 * model.decoder * tokens / flops
    sent = collective_bytes(model, ranks=ranks, micro_batches=math.ceil(share / rows), dtype=dtype)
    collectives = sent / (1e9 * collective_gbs(gpu, ranks, gpus_per_node))
    optimizer = 7 * FLOAT32 * model.trained / ranks / _moved(gpu)
    return UpdateTime(compute, collectives, optimizer)


def pack_s(model: ModelSizes, gpu: Gpu, *, ranks: int, gpus_per_node: int) -> float:
    """Publishing a version, as `weights.pack` and Ray do it; the learner waits meanwhile.

    Gather the shards, copy to the host, read twice (finite, checksum) on all cores, then Ray's copy with one core.
    """
    size = weight_bytes(model) / 1e9
    gather = size / collective_gbs(gpu, ranks, gpus_per_node) if ranks > 1 else 0.0
    return gather + size / (HOST_TO_GPU * gpu.pcie_gbs) + 2 * size / HOST_READ_GBS + size / HOST_COPY_GBS


def transfer_s(model: ModelSizes, gpu: Gpu, nodes: int) -> float:
    """Object store to object store: the learner's node sends a copy to each of ``nodes``.

    Nodes that hold a chunk may pass it on, which Ray does where it happens to pull from them; it is not counted on.
    """
    return nodes * weight_bytes(model) / (1e9 * min(RAY_NODE_GBS, NETWORK * gpu.host_network_gbs))


def load_s(model: ModelSizes, gpu: Gpu, workers_on_node: int) -> float:
    """A rollout worker verifies a version and takes it, as do the others of its node."""
    size = weight_bytes(model) / 1e9
    return size / (HOST_TO_GPU * gpu.pcie_gbs) + workers_on_node * size / HOST_READ_GBS


def nccl_transfer_s(model: ModelSizes, gpu: Gpu) -> float:
    """The same version in bfloat16 by one NCCL broadcast over the GPUs' own network: a pipeline, however many nodes."""
    return model.trained * BFLOAT16 / (1e9 * NETWORK * gpu.network_gbs)


def _flops(gpu: Gpu, dtype: str) -> float:
    return PRODUCTS * gpu.flops(dtype)


def _moved(gpu: Gpu) -> float:
    return MEMORY * 1e9 * gpu.memory_gbs
