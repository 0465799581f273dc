"""One policy version on its way from the learner to the engines: a manifest and a few chunks, whole or not at all.

Bytes move once, when Ray copies the learner's tensors into shared memory, in the dtype that the engines hold: `stream`
makes views (of what was laid out for that) or casts and checks them while Ray copies, `unpack` only makes views, and
every engine of a node reads the same bytes. Each tensor carries an xxh3-64 checksum, so a chunk that is short, swapped
or damaged is found before any weight is touched (promise 6).
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
from stage_ray.weights.adjacent import ALIGNMENT, aligned, joined

CHUNK_BYTES = 256 * 2**20  # Ray needs milliseconds for each object
BLOCK_BYTES = 2**20  # what is read once from memory and twice from a core's cache
Part = list[tuple[str, Tensor]]
Chunk = np.ndarray  # the bytes of a few tensors, uint8 [bytes], one Ray object: each begins at a multiple of 64

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    + (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}
_INFINITY = {torch.float64: 0x7FF << 52, torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


class WeightError(ValueError):
    """Tensors that cannot be packed, a version that does not verify or did not arrive: names the tensor or the rank."""


def stream(
    version: int,
    tensors: Iterable[tuple[str, Tensor]],
    chunk_bytes: int = CHUNK_BYTES,
    dtype: torch.dtype | None = None,
) -> tuple[int, Iterator[Chunk | WeightManifest]]:
    """Group tensors into chunks of at most ``chunk_bytes``; a larger tensor gets one of its own.

    Returns how many chunks there are, then those, made as they are asked for, and at last their manifest. Other threads
    checksum a chunk while the caller copies it. With ``dtype`` the tensors travel in that, cast a chunk at a time, so
    that no second copy of the version is held; those of `lay_out` on the CPU that have it share memory with the chunks.
    Take all before the weights move on, or they will not verify.

    Raises:
        WeightError: in place of what comes next, for a name that comes twice, a dtype that cannot travel, or values
            that are not finite.
    """
    parts = _parts(tensors, chunk_bytes, dtype)
    return len(parts), _stream(version, parts, dtype)


def pack(
    version: int,
    tensors: Iterable[tuple[str, Tensor]],
    chunk_bytes: int = CHUNK_BYTES,
    dtype: torch.dtype | None = None,
) -> tuple[WeightManifest, list[Chunk]]:
    """All that `stream` gives, at once: the manifest and the chunks."""
    chunks, manifest = list[Chunk](), None
    for item in stream(version, tensors, chunk_bytes, dtype)[1]:
        if isinstance(item, WeightManifest):
            manifest = item
        else:
            chunks.append(item)
    assert manifest is not None  # it comes last
    return manifest, chunks


def describe(
    version: int, tensors: Iterable[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype | None = None
) -> WeightManifest:
    """The manifest of a version that travels in no chunks, with checksums made on ``device``; otherwise as `pack`."""
    specs = list[TensorSpec]()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for chunk, part in enumerate(_parts(tensors, CHUNK_BYTES, dtype)):
            names, cast = [name for name, _ in part], [tensor.to(dtype=dtype) for _, tensor in part]
            found = pool.map(_examine, (tensor.to(device) for tensor in cast))
            specs += _specs(version, chunk, names, cast, [0] * len(cast), found)  # they travel one by one
            del cast  # of one chunk, forgotten before those of the next are made
    _require_unique(specs)
    return WeightManifest(version, tuple(specs), chunks=0)


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
        nbytes = aligned(tensor.numel() * (dtype or tensor.dtype).itemsize)
        if not parts or nbytes > room:
            parts.append([])
            room = chunk_bytes
        parts[-1].append((name, tensor.detach()))
        room -= nbytes
    return parts


def _stream(version: int, parts: Sequence[Part], dtype: torch.dtype | None) -> Iterator[Chunk | WeightManifest]:
    specs = list[TensorSpec]()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for chunk, part in enumerate(parts):
            names, (data, sent, starts) = [name for name, _ in part], joined([tensor for _, tensor in part], dtype)
            examined = [pool.submit(_examine, tensor) for tensor in sent]
            yield data.numpy()
            specs += _specs(version, chunk, names, sent, starts, (future.result() for future in examined))
            del data, sent, examined  # of one chunk, forgotten before those of the next are made
    _require_unique(specs)
    yield WeightManifest(version, tuple(specs), len(parts))


def _examine(tensor: Tensor) -> tuple[str, bool]:
    """Checksum of a tensor, made on its device, and whether every value is finite; lets other threads run meanwhile."""
    if tensor.device.type != "cpu":
        return weighted_sum(_flat(tensor)), finite(tensor)
    data, checksum, sound = _flat(tensor).numpy(), xxhash.xxh3_64(), True
    # Read as integers, only infinities and NaNs are at or beyond the infinity of their sign: two maxima, exact and
    # several times as fast as a sum, whose threads torch would start besides.
    size = tensor.element_size()
    infinity = _INFINITY.get(tensor.dtype)
    for start in range(0, len(data), BLOCK_BYTES):
        block = data[start : start + BLOCK_BYTES]
        checksum.update(block.data)
        if infinity is not None:
            positive, negative = block.view(f"i{size}").max(), block.view(f"u{size}").max()
            sound = sound and int(positive) < infinity and int(negative) < infinity + 2 ** (8 * size - 1)
    return checksum.hexdigest(), sound


def _specs(
    version: int,
    chunk: int,
    names: Sequence[str],
    tensors: Sequence[Tensor],
    starts: Sequence[int],
    examined: Iterable[tuple[str, bool]],
) -> Iterator[TensorSpec]:
    """Entries of one chunk's tensors as they travel: a cast makes an infinity of what is beyond the dtype's range."""
    for name, tensor, start, (checksum, sound) in zip(names, tensors, starts, examined, strict=True):
        known = str(tensor.dtype).removeprefix("torch.")
        if known not in DTYPES:
            raise WeightError(f"tensor {name!r} is {known}, which cannot be published; known are {', '.join(DTYPES)}")
        if not sound:
            raise WeightError(f"tensor {name!r} of version {version} holds values that are not finite")
        yield TensorSpec(name, tuple(tensor.shape), known, chunk, start, tensor.nbytes, checksum)


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
    if chunk.dtype != np.uint8 or chunk.ndim != 1:
        raise WeightError(f"{where} arrived as {chunk.dtype} {list(chunk.shape)}, not uint8 [bytes]")
    end = spec.start + spec.nbytes
    if not 0 <= spec.start <= end <= len(chunk) or spec.start % ALIGNMENT:
        raise WeightError(
            f"{where} is bytes {spec.start} to {end} of chunk {spec.chunk}, which has {len(chunk)}: truncated or other"
        )
    if not spec.nbytes:  # torch makes no view of an empty array
        return torch.empty(spec.shape, dtype=dtype)
    with warnings.catch_warnings():  # Ray hands out read-only arrays, and torch warns of each; none is written to
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(chunk[spec.start : end]).view(dtype).reshape(spec.shape)
