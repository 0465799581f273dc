"""Sharded tensors on disk: one safetensors file a rank, read again by any number of ranks. No pickle.

torch's distributed checkpoint does the work, with its Hugging Face storage: where a shard belongs stands in the header
of its file, as JSON.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from stage_ray.learner.batch import LearnerError


def save_shards(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's shards; every rank must."""
    writer = HuggingFaceStorageWriter(path=str(directory), save_distributed=True)
    checkpoint.save(dict(tensors), storage_writer=writer)


def load_shards(directory: Path, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """Read every tensor into new memory, sharded as this rank's are now; every rank must.

    Args:
        directory: of `save_shards`, by whatever number of ranks.
        like: the tensor whose sharding and device a key's has; None for a key that does not belong here.

    Raises:
        LearnerError: a file is missing, damaged or of another model; names it.
    """
    reader = HuggingFaceStorageReader(path=str(directory))
    try:
        saved = reader.read_metadata().state_dict_metadata
        found: dict[str, Tensor] = {}
        for key, metadata in saved.items():
            model, size = like(key), torch.Size(getattr(metadata, "size", ()))
            if model is None:
                raise LearnerError(f"learner state {directory} holds {key!r}, which this model does not train")
            if size and size != model.shape:
                shapes = f"{list(size)}, this model's is {list(model.shape)}"
                raise LearnerError(f"learner state {directory}: tensor {key!r} is {shapes}")
            found[key] = torch.zeros_like(model.detach()) if size else torch.zeros(())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one rank alone is told that it is alone
            checkpoint.load(found, storage_reader=reader, no_dist=not dist.is_initialized())
    except (OSError, SafetensorError, CheckpointException, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, LearnerError):
            raise
        reason = str(error).strip().splitlines()
        raise LearnerError(f"learner state {directory} cannot be read: {reason[-1] if reason else error!r}") from error
    return found


def sharded_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, cut as ``model`` is; one that is cut already, or a scalar, stays as it is."""
    if not isinstance(model, DTensor) or isinstance(tensor, DTensor) or tensor.dim() == 0:
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)
