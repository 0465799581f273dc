"""Matrix products of frozen weights, together with what follows them: oneDNN's on a CPU, else plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage_ray.policies.lora import merged_weight


class PackedLinear:
    """Linear modules that read the same ``x``, side by side: float [..., in] -> [..., sum of their outputs].

    A CPU's float32 weights are copied once, as one matrix in the blocks that oneDNN reads; others stay where they are.
    """

    def __init__(self, modules: Sequence[nn.Module], rows: int) -> None:
        """Of ``nn.Linear`` modules; ``rows``: of the products that it will see most."""
        self._parts: list[tuple[Tensor, Tensor | None]] = [(merged_weight(one), one.bias) for one in modules]  # type: ignore[misc]
        first, biases = self._parts[0][0], [bias for _, bias in self._parts if bias is not None]
        cpu = first.device.type == "cpu" and first.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        self._packed = cpu and len(biases) in (0, len(modules))
        if self._packed:
            weight = torch.cat([weight.detach() for weight, _ in self._parts])
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            self._bias = torch.cat(biases).detach() if biases else None
            self._fused = torch.ops.mkldnn._linear_pointwise  # what torch.compile calls for frozen weights

    def __call__(self, x: Tensor) -> Tensor:
        """The products alone."""
        if self._packed:
            return self._fused(x, self._weight, self._bias, "none", [], "")
        products = [F.linear(x, *part) for part in self._parts]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the products."""
        return self._fused(x, self._weight, self._bias, "swish", [], "") if self._packed else F.silu(self(x))

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The products times ``other``."""
        return self._fused.binary(x, other, self._weight, self._bias, "mul") if self._packed else self(x) * other

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The products plus ``other``."""
        return self._fused.binary(x, other, self._weight, self._bias, "add") if self._packed else self(x) + other
