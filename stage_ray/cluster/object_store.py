"""How large Ray's object store must be: two versions of the weights, and the images that wait to be scored."""

from __future__ import annotations

import math

import torch

from stage_ray.config import RunConfig
from stage_ray.config.model_sizes import BFLOAT16, KNOWN
from stage_ray.policies import policy_class
from stage_ray.policies.devices import compute_dtype
from stage_ray.pretrained import base_location, located, tensor_shapes
from stage_ray.samplers import load_search

MB = 2**20
LEAST_MB = 512
IMAGE_BYTES = 2**19  # a picture of 384 x 384 pixels and the records of its 576 tokens
SLACK = 1.1  # the store is never filled without gaps


def two_versions_mb(run: RunConfig) -> int | None:
    """MB of two versions of the weights as they travel: engines serve one while the next is stored.

    None of a model that is not on this machine, and of no published size.
    """
    path = base_location(run.policy.path)
    directory = located(path)
    if directory is None:
        name = path.partition("@")[0]  # of the repository, without its revision
        trained = next((known.trained for known in KNOWN.values() if known.path == name), None)
    else:
        shapes = tensor_shapes(directory, (policy_class(run.policy).trained_prefix,))
        trained = sum(map(math.prod, shapes.values()))
    return trained and math.ceil(2 * trained * _width(run) / MB)


def batches_at_once(run: RunConfig) -> int:
    """Batches that an evaluation asks for at once: one is drawn and one waits for each worker; one is scored."""
    drawing, *judging = (pool.max_workers or pool.workers for pool in (run.rollout, *run.scoring_pools))
    return 2 * drawing + max(judging)


def store_mb(run: RunConfig, *, weights: bool = True) -> int:
    """MB of the object store of a cluster that the run starts; ``weights``: whether versions of them travel."""
    if run.cluster.object_store_mb is not None:
        return run.cluster.object_store_mb
    rollout = run.rollout
    search = load_search(rollout, [reward.column for reward in run.rewards])
    drawn = rollout.group_size * (1 if search is None else search.candidates)
    waiting = rollout.groups_per_step * drawn * (run.pipeline.max_staleness + 1)
    # An evaluation's are not there while images to train on wait.
    images = max(waiting, batches_at_once(run) * rollout.images_per_batch * run.evaluation.enabled)
    versions = (two_versions_mb(run) or 0) if weights else 0
    return max(LEAST_MB, math.ceil(SLACK * (versions + images * IMAGE_BYTES / MB)))


def _width(run: RunConfig) -> int:
    """Bytes of a number in the engines, as far as this machine can tell without a look at its GPUs."""
    if run.rollout.dtype == "auto" and run.rollout.gpus:
        return BFLOAT16  # every GPU since 2020 has it
    return compute_dtype(run.rollout.dtype, torch.device("cpu")).itemsize
