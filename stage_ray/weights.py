"""One policy version on its way from the learner to the engines: a manifest and a few byte chunks, whole or not at all.

The learner packs once and hands the chunks to Ray; every engine unpacks the same bytes. Each tensor carries an xxh3-64
checksum, so a chunk that is short, swapped or damaged is found before any weight is touched (promise 6).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from stage_ray.records import TensorSpec, WeightManifest

CHUNK_BYTES = 64 * 2**20
ALIGNMENT = 64
"""Every tensor starts at a multiple of this in its chunk, so that it can be read in place whatever its dtype."""

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    + (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}


class WeightError(ValueError):
    """A version that does not verify, or tensors that cannot be packed: names the tensor and what is wrong with it."""


def pack(
    version: int, tensors: Iterable[tuple[str, Tensor]], chunk_bytes: int = CHUNK_BYTES
) -> tuple[WeightManifest, list[np.ndarray]]:
    """Copy tensors into chunks of at most ``chunk_bytes``; a larger tensor gets a chunk of its own.

    Args:
        version: policy version of these weights.
        tensors: (name, tensor) of any device and dtype of `DTYPES`; names must be unique.
        chunk_bytes: bytes of one chunk.

    Returns:
        The manifest, and the chunks, uint8 [bytes] each. Nothing is shared with the tensors.

    Raises:
        WeightError: a name that comes twice, or a dtype that cannot travel.
        ValueError: ``chunk_bytes`` below 1.

    Example:
        >>> manifest, chunks = pack(7, [("w", torch.ones(2, 2))])
        >>> manifest.version, manifest.chunks, unpack(manifest, chunks)[0][1].tolist()
        (7, 1, [[1.0, 1.0], [1.0, 1.0]])
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; at least 1 is needed")
    specs: list[TensorSpec] = []
    chunks: list[np.ndarray] = []
    open_chunk: list[tuple[int, np.ndarray]] = []  # (offset, bytes) of the tensors in the chunk that is being filled
    end = 0
    for name, tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise WeightError(f"tensor {name!r} is {dtype}, which cannot be published; known are {', '.join(DTYPES)}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        if open_chunk and offset + data.nbytes > chunk_bytes:
            chunks.append(_join(open_chunk))
            open_chunk, offset = [], 0
        open_chunk.append((offset, data))
        end = offset + data.nbytes
        checksum = xxhash.xxh3_64_hexdigest(data.data)
        specs.append(TensorSpec(name, tuple(tensor.shape), dtype, len(chunks), offset, data.nbytes, checksum))
    if open_chunk:
        chunks.append(_join(open_chunk))
    _require_unique(specs)
    return WeightManifest(version, tuple(specs), len(chunks)), chunks


def unpack(manifest: WeightManifest, chunks: Sequence[np.ndarray]) -> list[tuple[str, Tensor]]:
    """Verify every tensor of a version, then hand all of them out.

    Args:
        manifest: of `pack`.
        chunks: uint8 [bytes] each, in the order of `pack`; may be read-only.

    Returns:
        (name, tensor) in the order they were packed, on the CPU: views into the chunks, to be read and not written.

    Raises:
        WeightError: a chunk is missing, short or of another dtype, a tensor's bytes changed, or the manifest
            contradicts itself. Nothing is handed out then.
    """
    if len(chunks) != manifest.chunks:
        raise WeightError(f"version {manifest.version} has {manifest.chunks} chunks, but {len(chunks)} arrived")
    _require_unique(manifest.tensors)
    return [(spec.name, _verified(spec, manifest.version, chunks)) for spec in manifest.tensors]


def _join(content: list[tuple[int, np.ndarray]]) -> np.ndarray:
    offset, last = content[-1]
    chunk = np.zeros(offset + last.nbytes, dtype=np.uint8)
    for offset, data in content:
        chunk[offset : offset + data.nbytes] = data
    return chunk


def _require_unique(specs: Sequence[TensorSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise WeightError(f"tensor {spec.name!r} comes twice in one version")
        seen.add(spec.name)


def _verified(spec: TensorSpec, version: int, chunks: Sequence[np.ndarray]) -> Tensor:
    where = f"tensor {spec.name!r} of version {version}"
    dtype = DTYPES.get(spec.dtype)
    if dtype is None:
        raise WeightError(f"{where} has the unknown dtype {spec.dtype!r}")
    if spec.nbytes != math.prod(spec.shape) * dtype.itemsize:
        raise WeightError(f"{where}: {spec.nbytes} bytes are not {spec.dtype} {list(spec.shape)}; dtype or shape off")
    if not 0 <= spec.chunk < len(chunks):
        raise WeightError(f"{where} lies in chunk {spec.chunk}, but there are {len(chunks)} chunks")
    chunk = chunks[spec.chunk]
    if chunk.dtype != np.uint8 or chunk.ndim != 1:
        raise WeightError(f"{where}: its chunk {spec.chunk} is {chunk.dtype} {list(chunk.shape)}, not uint8 [bytes]")
    if spec.offset < 0 or spec.offset % ALIGNMENT or spec.offset + spec.nbytes > chunk.nbytes:
        raise WeightError(
            f"{where} should be bytes {spec.offset} to {spec.offset + spec.nbytes} of chunk {spec.chunk}, "
            f"which has {chunk.nbytes}; the chunk is truncated or another one"
        )
    data = chunk[spec.offset : spec.offset + spec.nbytes]
    checksum = xxhash.xxh3_64_hexdigest(data.data)
    if checksum != spec.checksum:
        raise WeightError(f"{where} has checksum {checksum} instead of {spec.checksum}; its bytes changed on the way")
    if not spec.nbytes:  # torch makes no view of an empty array
        return torch.empty(spec.shape, dtype=dtype)
    with warnings.catch_warnings():  # Ray hands out read-only arrays, and torch warns of each; nobody writes to these
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data).view(dtype).reshape(spec.shape)
