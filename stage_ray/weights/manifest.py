"""One policy version on its way from the learner to the engines: a manifest and a few chunks, whole or not at all.

Bytes move once, when Ray copies the learner's tensors into shared memory, in the dtype that the engines hold: `pack`
makes views or casts, `unpack` only makes views, and every engine of a node reads the same bytes. Each tensor carries an
xxh3-64 checksum, so a chunk that is short, swapped or damaged is found before any weight is touched (promise 6).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import xxhash
from torch import Tensor

from stage_ray.records import TensorSpec, WeightManifest

CHUNK_BYTES = 256 * 2**20  # Ray needs milliseconds for each object
Part = list[tuple[str, Tensor]]
Chunk = tuple[np.ndarray, ...]  # a few tensors' bytes, uint8 [bytes] each: one Ray object, each array 64-aligned in it

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    + (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}


class WeightError(ValueError):
    """Tensors that cannot be packed, a version that does not verify or did not arrive: names the tensor or the rank."""


def pack(
    version: int,
    tensors: Iterable[tuple[str, Tensor]],
    chunk_bytes: int = CHUNK_BYTES,
    dtype: torch.dtype | None = None,
) -> tuple[WeightManifest, Iterator[Chunk]]:
    """Checksum tensors and group them into chunks of at most ``chunk_bytes``; a larger tensor gets one of its own.

    Chunks are made as they are asked for. With ``dtype`` the tensors travel in that, cast a chunk at a time, so that no
    second copy of the version is held; tensors on the CPU that have it share memory with the chunks. Take the chunks
    before the weights move on, or they will not verify.

    Raises:
        WeightError: a name that comes twice, a dtype that cannot travel, or values that are not finite.
    """
    parts = _parts(tensors, chunk_bytes, dtype)
    manifest = _manifest(version, parts, dtype, torch.device("cpu"), chunks=len(parts))
    return manifest, (tuple(_flat(tensor.to(dtype=dtype).cpu()).numpy() for _, tensor in part) for part in parts)


def describe(
    version: int, tensors: Iterable[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype | None = None
) -> WeightManifest:
    """The manifest of a version that travels in no chunks, with checksums made on ``device``; otherwise as `pack`."""
    return _manifest(version, _parts(tensors, CHUNK_BYTES, dtype), dtype, device, chunks=0)


def verify(manifest: WeightManifest, tensors: Sequence[Tensor]) -> None:
    """Raise a WeightError unless tensors, in the manifest's order, have its checksums, made on that kind of device."""
    checksums = _checksums(tensors, tensors[0].device) if tensors else []
    for spec, checksum in zip(manifest.tensors, checksums, strict=True):
        if checksum != spec.checksum:
            raise WeightError(
                f"tensor {spec.name!r} of version {manifest.version} has checksum {checksum} instead of "
                f"{spec.checksum}; its bytes changed on the way"
            )


def unpack(manifest: WeightManifest, chunks: Sequence[Chunk]) -> list[tuple[str, Tensor]]:
    """Verify every tensor of a version, then hand all of them out, in the order in which they were packed.

    They are finite (`pack` saw to it) and on the CPU: views into the chunks, to be read and not written.

    Raises:
        WeightError: a chunk is missing, short or of another dtype, a tensor's bytes changed, or the manifest
            contradicts itself. Nothing is handed out then.
    """
    if len(chunks) != manifest.chunks:
        raise WeightError(f"version {manifest.version} has {manifest.chunks} chunks, but {len(chunks)} arrived")
    _require_unique(manifest.tensors)
    tensors = [_view(spec, f"tensor {spec.name!r} of version {manifest.version}", chunks) for spec in manifest.tensors]
    verify(manifest, tensors)
    return [(spec.name, tensor) for spec, tensor in zip(manifest.tensors, tensors, strict=True)]


def finite(tensor: Tensor) -> bool:
    """Whether every value is."""
    # A sum over an infinity or a NaN is not finite. It reads memory once, while `torch.isfinite` writes some more; only
    # a sum that overflows needs the second look.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def weighted_sum(data: Tensor) -> str:
    """Checksum of uint8 [bytes] for a GPU, which has no xxh3: each byte times its place, so that order counts too."""
    total = 0
    for part in data.split(2**24):
        places = torch.arange(1, len(part) + 1, device=data.device)
        total = (total * 1_000_003 + int((part * places).sum())) % 2**64
    return f"{total:016x}"


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _checksums(tensors: Iterable[Tensor], device: torch.device) -> list[str]:
    flat = (_flat(tensor.to(device)) for tensor in tensors)
    if device.type != "cpu":
        return list(map(weighted_sum, flat))
    # On as many cores as torch would use: xxhash lets other threads run meanwhile.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(lambda data: xxhash.xxh3_64_hexdigest(data.numpy().data), flat))


def _parts(tensors: Iterable[tuple[str, Tensor]], chunk_bytes: int, dtype: torch.dtype | None) -> list[Part]:
    """Tensors, not cast yet, by the chunk in which they travel."""
    parts: list[Part] = []
    room = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if not parts or nbytes > room:
            parts.append([])
            room = chunk_bytes
        parts[-1].append((name, tensor.detach()))
        room -= nbytes
    return parts


def _manifest(
    version: int, parts: Sequence[Part], dtype: torch.dtype | None, device: torch.device, chunks: int
) -> WeightManifest:
    specs = []
    for chunk, part in enumerate(parts):
        cast = [tensor.to(dtype=dtype) for _, tensor in part]  # of one chunk, forgotten before those of the next
        checksums = _checksums(cast, device)
        for index, ((name, _), tensor, checksum) in enumerate(zip(part, cast, checksums, strict=True)):
            known = str(tensor.dtype).removeprefix("torch.")
            if known not in DTYPES:
                raise WeightError(
                    f"tensor {name!r} is {known}, which cannot be published; known are {', '.join(DTYPES)}"
                )
            if not finite(tensor):  # as it travels: a cast makes an infinity of what is beyond the dtype's range
                raise WeightError(f"tensor {name!r} of version {version} holds values that are not finite")
            specs.append(TensorSpec(name, tuple(tensor.shape), known, chunk, index, tensor.nbytes, checksum))
    _require_unique(specs)
    return WeightManifest(version, tuple(specs), chunks)


def _require_unique(specs: Sequence[TensorSpec]) -> None:
    for name, count in Counter(spec.name for spec in specs).items():
        if count > 1:
            raise WeightError(f"tensor {name!r} comes twice in one version")


def _view(spec: TensorSpec, where: str, chunks: Sequence[Chunk]) -> Tensor:
    """The bytes of one tensor, as many as its manifest promises and not yet verified, as that tensor."""
    dtype = DTYPES.get(spec.dtype)
    if dtype is None:
        raise WeightError(f"{where} has the unknown dtype {spec.dtype!r}")
    if spec.nbytes != math.prod(spec.shape) * dtype.itemsize:
        raise WeightError(f"{where}: {spec.nbytes} bytes are not {spec.dtype} {list(spec.shape)}; dtype or shape off")
    if not 0 <= spec.chunk < len(chunks):
        raise WeightError(f"{where} lies in chunk {spec.chunk}, but there are {len(chunks)} chunks")
    chunk = chunks[spec.chunk]
    if not 0 <= spec.index < len(chunk):
        raise WeightError(f"{where} is number {spec.index} of chunk {spec.chunk}, which is truncated to {len(chunk)}")
    data = chunk[spec.index]
    if data.dtype != np.uint8 or data.ndim != 1:
        raise WeightError(f"{where} arrived as {data.dtype} {list(data.shape)}, not uint8 [bytes]")
    if data.nbytes != spec.nbytes:
        raise WeightError(f"{where} has {data.nbytes} bytes instead of {spec.nbytes}; truncated or another one")
    if not spec.nbytes:  # torch makes no view of an empty array
        return torch.empty(spec.shape, dtype=dtype)
    with warnings.catch_warnings():  # Ray hands out read-only arrays, and torch warns of each; none is written to
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data).view(dtype).reshape(spec.shape)
