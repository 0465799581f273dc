"""Tensors of one rank on disk: safetensors files, of which the headers say where in the whole tensors they belong.

Any number of ranks reads what any number wrote, through torch's distributed checkpoint. Its own writer makes one object
of all bytes first, and while it does the process answers no ping. Here tensors are written one after the other, in
pieces, and other threads run meanwhile.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as checkpoint
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from stage_ray.files import FileDigest, flush_to_disk
from stage_ray.learner.batch import LearnerError

PIECE_BYTES = 2**24  # written and hashed at once
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in a header

Part = tuple[Tensor, Sequence[int]]
"""A part of a tensor, and where in the whole it begins, in each dimension."""


def write_parts(path: Path, parts: Mapping[str, Part]) -> FileDigest:
    """Write a file and flush it to disk; what was written.

    A tensor of a GPU is copied when its turn comes, so no more than the largest is held on the CPU.
    """
    digest, size = xxhash.xxh3_64(), 0
    with path.open("wb") as file:
        for piece in _pieces(parts):
            digest.update(piece)
            size += file.write(piece)
        file.flush()
        flush_to_disk(file.fileno())
    return FileDigest(size, digest.hexdigest())


def read_parts(directory: Path, parameters: Mapping[str, nn.Parameter], *, alone: bool) -> dict[str, Tensor]:
    """Every tensor of a directory in new memory, sharded as its parameter is here; scalars on the CPU.

    Args:
        parameters: by name; a tensor's name is that of its parameter, or ends in it after a slash.
        alone: read by this rank only; else every rank must call it.

    Raises:
        LearnerError: a file is damaged, or of another model.
    """
    reader = HuggingFaceStorageReader(path=str(directory))
    try:
        saved = reader.read_metadata().state_dict_metadata
        sizes = {key: torch.Size(getattr(metadata, "size", ())) for key, metadata in saved.items()}  # of a scalar: none
        found = _empty_tensors(directory, sizes, parameters)
        with warnings.catch_warnings():  # torch warns a rank that reads alone
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            checkpoint.load(found, storage_reader=reader, no_dist=alone)
    except (OSError, SafetensorError, CheckpointException, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, LearnerError):  # it is a RuntimeError that says already what is wrong
            raise
        reason = str(error).strip().splitlines()
        raise LearnerError(f"learner state {directory} cannot be read: {reason[-1] if reason else error!r}") from error
    return found


def _pieces(parts: Mapping[str, Part]) -> Iterator[bytes | memoryview]:
    """A safetensors file: the header's length and the header, then the tensors' bytes."""
    offsets = {name: {"saved_offsets": [*begins]} for name, (_, begins) in parts.items()}
    about = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}  # as torch's own writer
    header: dict[str, object] = {"__metadata__": about}
    end = 0
    for name, (tensor, _) in parts.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data
    yield len(text).to_bytes(8, "little") + text
    for tensor, _ in parts.values():
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        for piece in data.split(PIECE_BYTES):
            yield piece.numpy().data


def _empty_tensors(
    directory: Path, sizes: Mapping[str, torch.Size], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """A tensor to read into for each saved one, whose names and sizes must be this model's."""
    empty = {}
    for key, size in sizes.items():
        parameter = parameters.get(key.partition("/")[2] or key)  # a moment has its parameter's name after the slash
        if parameter is None:
            raise LearnerError(f"learner state {directory} holds {key!r}, which this model does not train")
        if size and size != parameter.shape:
            own = list(parameter.shape)
            raise LearnerError(f"learner state {directory}: tensor {key!r} is {list(size)}, this model's is {own}")
        empty[key] = torch.zeros_like(parameter.detach()) if size else torch.zeros(())  # AdamW's step is a scalar
    if lacking := [name for name in parameters if name not in empty]:
        raise LearnerError(f"learner state {directory} is of another model: it lacks tensor {lacking[0]!r}")
    return empty
