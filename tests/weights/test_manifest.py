from __future__ import annotations

import dataclasses
import weakref

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from stage_ray.records import WeightManifest
from stage_ray.weights.adjacent import lay_out
from stage_ray.weights.manifest import (
    BLOCK_BYTES,
    DTYPES,
    WeightError,
    describe,
    finite,
    pack,
    stream,
    unpack,
    verify,
    weighted_sum,
)

TENSORS = [
    ("embed", torch.arange(12, dtype=torch.float32).view(3, 4)),
    ("half", torch.tensor([1.5, -2.0, 3e38]).bfloat16()),
    ("scalar", torch.tensor(7, dtype=torch.int64)),
    ("none", torch.zeros(0, 5)),
    ("flag", torch.tensor([True, False])),
]


def spoiled(manifest: WeightManifest, tensor: str, **changes: object) -> WeightManifest:
    """The manifest with one tensor's entry changed."""
    specs = tuple(dataclasses.replace(s, **changes) if s.name == tensor else s for s in manifest.tensors)
    return dataclasses.replace(manifest, tensors=specs)


@pytest.mark.parametrize("chunk_bytes", [1, 20, 64, 100, 2**20])
def test_every_tensor_comes_back_bit_for_bit_whatever_the_size_of_chunks(chunk_bytes: int) -> None:
    manifest, chunks = pack(3, TENSORS, chunk_bytes)
    back = unpack(manifest, chunks)
    assert [name for name, _ in back] == [name for name, _ in TENSORS]
    for (_, sent), (_, got) in zip(TENSORS, back, strict=True):
        assert got.dtype == sent.dtype
        assert got.shape == sent.shape
        assert torch.equal(got, sent)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.integers(0, 40)), max_size=12), st.integers(1, 300))
def test_chunks_hold_no_more_than_asked_unless_one_tensor_alone_is_larger(
    kinds: list[tuple[str, int]], chunk_bytes: int
) -> None:
    tensors = [(f"t{i}", torch.ones(size).to(DTYPES[dtype])) for i, (dtype, size) in enumerate(kinds)]
    manifest, chunks = pack(0, tensors, chunk_bytes)
    for index, chunk in enumerate(chunks):
        inside = [spec for spec in manifest.tensors if spec.chunk == index]
        assert chunk.nbytes <= chunk_bytes or len([spec for spec in inside if spec.nbytes]) == 1
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors, unpack(manifest, chunks), strict=True))


def test_chunks_are_views_and_are_refused_once_the_weights_have_moved_on() -> None:
    weight = torch.ones(4)
    manifest, chunks = pack(1, [("w", weight)])
    assert chunks[0].ctypes.data == weight.data_ptr()
    weight.add_(1)
    with pytest.raises(WeightError, match="tensor 'w' of version 1 has checksum"):
        unpack(manifest, chunks)


@pytest.mark.parametrize("chunk_bytes", [100, 2**20])
def test_parameters_that_were_laid_out_keep_their_values_and_each_chunk_is_their_memory(chunk_bytes: int) -> None:
    shapes = [(3, 5), (7,), (), (0, 4), (8, 8)]
    values = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    lay_out(parameters)
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, values, strict=True))
    manifest, chunks = pack(1, [(f"w{i}", parameter) for i, parameter in enumerate(parameters)], chunk_bytes)
    for spec, parameter in zip(manifest.tensors, parameters, strict=True):
        if parameter.numel():
            assert chunks[spec.chunk].ctypes.data + spec.start == parameter.data_ptr()
            assert parameter.data_ptr() % 64 == parameters[0].data_ptr() % 64
    assert all(torch.equal(got, value) for (_, got), value in zip(unpack(manifest, chunks), values, strict=True))


@pytest.mark.parametrize("chunk_bytes", [1, 100, 2**20])
def test_a_version_travels_in_the_dtype_that_the_engines_hold_rounded_as_they_round(chunk_bytes: int) -> None:
    weights = {f"w{i}": torch.randn(37, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    manifest, chunks = pack(1, weights.items(), chunk_bytes, dtype=torch.bfloat16)
    assert {spec.dtype for spec in manifest.tensors} == {"bfloat16"}
    assert sum(spec.nbytes for spec in manifest.tensors) == 2 * 4 * 37 * 5
    assert all(torch.equal(got, weights[name].bfloat16()) for name, got in unpack(manifest, chunks))
    described = describe(1, weights.items(), torch.device("cpu"), torch.bfloat16)
    assert [spec.checksum for spec in described.tensors] == [spec.checksum for spec in manifest.tensors]


def test_a_version_that_is_cast_is_held_a_chunk_at_a_time() -> None:
    weights = [(f"w{i}", torch.full((100,), float(i))) for i in range(6)]
    seen: list[weakref.ref[np.ndarray]] = []
    count, items = stream(1, weights, 200, torch.bfloat16)
    for item in items:
        assert all(before() is None for before in seen)
        if isinstance(item, WeightManifest):
            assert item.chunks == count == len(seen) == 6
        else:
            seen.append(weakref.ref(item))
        del item


def test_what_is_beyond_the_range_of_the_dtype_is_never_packed() -> None:
    weight = torch.tensor([1.0, 3.4e38])  # bfloat16 rounds it to infinity
    assert pack(1, [("w", weight)])
    with pytest.raises(WeightError, match="tensor 'w' of version 1 holds values that are not finite"):
        pack(1, [("w", weight)], dtype=torch.bfloat16)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, -torch.nan])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_values_that_are_not_finite_are_never_packed(value: float, dtype: str) -> None:
    weight = torch.zeros(100_000, dtype=DTYPES[dtype])
    weight[77_777] = value
    with pytest.raises(WeightError, match="tensor 'w' of version 1 holds values that are not finite"):
        pack(1, [("w", weight)])


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.is_floating_point])
def test_the_largest_finite_values_of_every_dtype_travel(dtype: torch.dtype) -> None:
    weight = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, -0.0, torch.finfo(dtype).tiny], dtype=dtype)
    assert torch.equal(unpack(*pack(1, [("w", weight)]))[0][1], weight)


def test_a_value_beyond_the_first_block_is_examined_and_its_block_checksummed() -> None:
    weight = torch.zeros(2 * BLOCK_BYTES // 4 + 5)
    assert pack(1, [("w", weight)])[0].tensors[0].checksum == xxhash.xxh3_64_hexdigest(weight.numpy().data)
    weight[-1] = torch.nan
    with pytest.raises(WeightError, match="not finite"):
        pack(1, [("w", weight)])


def test_infinities_of_both_signs_do_not_cancel() -> None:
    assert not finite(torch.tensor([torch.inf, -torch.inf]))


def test_finite_values_whose_sum_overflows_are_finite() -> None:
    assert finite(torch.full((1000,), 3e38)) and finite(torch.full((1000,), 6e4).half())


def test_strided_tensors_and_parameters_travel() -> None:
    manifest, chunks = pack(1, [("w", torch.nn.Parameter(torch.arange(6.0).view(2, 3).t()))])
    assert torch.equal(unpack(manifest, chunks)[0][1], torch.arange(6.0).view(2, 3).t())


def test_unpacked_tensors_share_the_chunks_memory_even_when_read_only(recwarn: pytest.WarningsRecorder) -> None:
    manifest, chunks = pack(1, TENSORS)
    chunks[0].flags.writeable = False
    tensor = unpack(manifest, chunks)[0][1]
    assert tensor.data_ptr() == chunks[0].ctypes.data
    assert not recwarn.list


def test_a_flipped_bit_is_found_and_the_tensor_named() -> None:
    manifest, chunks = pack(9, TENSORS)
    chunks = [chunk.copy() for chunk in chunks]
    chunks[0][manifest.tensors[1].start + 3] ^= 4
    with pytest.raises(WeightError, match=r"tensor 'half' of version 9 has checksum .* its bytes changed"):
        unpack(manifest, chunks)


def test_a_truncated_chunk_is_found_and_the_tensor_named() -> None:
    manifest, (chunk,) = pack(9, TENSORS)
    with pytest.raises(WeightError, match=r"tensor 'flag' of version 9 .* truncated"):
        unpack(manifest, [chunk[:-1]])


def test_a_missing_chunk_is_found() -> None:
    manifest, chunks = pack(9, TENSORS, chunk_bytes=64)
    assert len(chunks) > 1
    with pytest.raises(WeightError, match=rf"version 9 has {len(chunks)} chunks, but {len(chunks) - 1} arrived"):
        unpack(manifest, chunks[:-1])


def test_swapped_chunks_are_found() -> None:
    manifest, chunks = pack(9, [("a", torch.zeros(8)), ("b", torch.ones(8))], chunk_bytes=64)
    with pytest.raises(WeightError, match="tensor 'a' of version 9"):
        unpack(manifest, chunks[::-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (3, 5)}, "dtype or shape"),
        ({"dtype": "float64"}, "dtype or shape"),
        ({"dtype": "float31"}, "unknown dtype 'float31'"),
        ({"chunk": 4}, "lies in chunk 4"),
        ({"start": 2**20}, "is bytes 1048576 to 1048624 of chunk 0"),
        ({"start": -64}, "is bytes -64 to -16 of chunk 0"),
        ({"start": 1}, "truncated or other"),
        ({"name": "half"}, "comes twice"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changes: dict[str, object], message: str) -> None:
    manifest, chunks = pack(9, TENSORS)
    with pytest.raises(WeightError, match=message):
        unpack(spoiled(manifest, "embed", **changes), chunks)


def test_a_chunk_that_is_not_bytes_is_refused() -> None:
    manifest, chunks = pack(9, TENSORS)
    with pytest.raises(WeightError, match="not uint8"):
        unpack(manifest, [chunks[0].astype(np.float32)])


def test_tensors_that_cannot_travel_are_refused_by_name() -> None:
    with pytest.raises(WeightError, match="tensor 'z' is complex64"):
        pack(0, [("z", torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(WeightError, match="'w' comes twice"):
        pack(0, [("w", torch.zeros(2)), ("w", torch.ones(2))])


def test_an_empty_version_is_a_version() -> None:
    assert unpack(*pack(0, [])) == []


def test_a_described_version_is_refused_when_a_byte_changed_and_its_tensor_is_named() -> None:
    manifest = describe(9, TENSORS, torch.device("cpu"))
    assert manifest.chunks == 0 and [spec.checksum for spec in manifest.tensors] == [
        spec.checksum for spec in pack(9, TENSORS)[0].tensors
    ]
    copies = [tensor.clone() for _, tensor in TENSORS]
    verify(manifest, copies)
    copies[1].view(torch.uint8)[3] ^= 4
    with pytest.raises(WeightError, match="tensor 'half' of version 9 has checksum .* its bytes changed"):
        verify(manifest, copies)


def test_what_is_not_finite_or_of_an_unknown_dtype_is_never_described() -> None:
    with pytest.raises(WeightError, match="tensor 'w' of version 1 holds values that are not finite"):
        describe(1, [("w", torch.tensor([1.0, torch.nan]))], torch.device("cpu"))
    with pytest.raises(WeightError, match="tensor 'w' is complex64"):
        describe(1, [("w", torch.zeros(1, dtype=torch.complex64))], torch.device("cpu"))


@given(st.lists(st.integers(0, 255), min_size=1, max_size=50), st.data())
def test_the_checksum_of_a_gpu_sees_every_changed_byte_and_every_exchange(
    values: list[int], data: st.DataObject
) -> None:
    before = torch.tensor(values, dtype=torch.uint8)
    place, other = (data.draw(st.integers(0, len(values) - 1)) for _ in range(2))
    after = before.clone()
    after[place] ^= data.draw(st.integers(1, 255))
    assert weighted_sum(after) != weighted_sum(before)
    after = before.clone()
    after[[place, other]] = before[[other, place]]
    assert (weighted_sum(after) == weighted_sum(before)) == torch.equal(after, before)


def test_the_checksum_of_a_gpu_goes_beyond_its_first_part() -> None:
    before = torch.zeros(2**24 + 5, dtype=torch.uint8)
    before[0] = 1
    after = before.roll(2**24)
    assert weighted_sum(after) != weighted_sum(before)
