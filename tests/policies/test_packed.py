"""Packed products against the modules that they are made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stage_ray.policies.packed import PackedLinear

PACKS = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def modules(biases: tuple[bool, ...], dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(16, 8 * (index + 1), bias=bias, dtype=dtype) for index, bias in enumerate(biases)]


@torch.no_grad()
@pytest.mark.parametrize("biases", [(False,), (True,), (False, False), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_those_of_the_modules_side_by_side_and_of_what_follows(
    biases: tuple[bool, ...], dtype: torch.dtype
) -> None:
    parts = modules(biases, dtype)
    packed, x = PackedLinear(parts, 6), torch.randn(2, 3, 16, dtype=dtype)
    expected = torch.cat([part(x) for part in parts], dim=-1)
    other = torch.randn_like(expected)
    torch.testing.assert_close(packed(x), expected)
    torch.testing.assert_close(packed.silu(x), F.silu(expected))
    torch.testing.assert_close(packed.times(x, other), expected * other)
    torch.testing.assert_close(packed.plus(x, other), expected + other)


@PACKS
@torch.no_grad()
def test_float32_weights_of_a_cpu_are_copied_and_others_are_read_where_they_lie() -> None:
    x = torch.randn(2, 16)
    for dtype, copied in ((torch.float32, True), (torch.bfloat16, False)):
        (part,) = modules((False,), dtype)
        packed, before = PackedLinear([part], 2), part(x.to(dtype))
        part.weight.zero_()  # type: ignore[operator]
        assert torch.allclose(packed(x.to(dtype)), before if copied else torch.zeros_like(before), atol=1e-5)
