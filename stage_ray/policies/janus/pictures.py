"""Pictures from image tokens: what `JanusVQVAE.decode` computes, up to rounding, in fewer operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import JanusVQVAE

FEW_PIXELS = 1024  # below it torch's GroupNorm of channels-last maps is not vectorised on a CPU


class PictureDecoder:
    """The decoder of a `JanusVQVAE`, over its own modules; what depends on weights alone is computed here, once.

    Made for one batch: it does not see later changes of the weights, nor of their device.
    """

    def __init__(self, vqmodel: JanusVQVAE) -> None:
        decoder, post = vqmodel.decoder, vqmodel.post_quant_conv
        codes = F.normalize(vqmodel.quantize.embedding.weight, p=2, dim=-1)
        # The first convolution has one tap, so it sees single codes: a row for each of them.
        self._table = F.linear(codes, post.weight.flatten(1), post.bias)  # [V, C]
        self._modules: Any = decoder
        levels = list(decoder.up)[:-1]  # the last one does not upsample
        self._blocks = [[which for which, block in enumerate(level.block) if _adds(block)] for level in decoder.up]
        self._upsample = [(upsampling_kernel(level.upsample.conv.weight), level.upsample.conv.bias) for level in levels]

    def __call__(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens int64 [B, T] of a ``grid``, on the weights' device -> pixels float32 [B, 3, H, W], in -1..1."""
        decoder, mid = self._modules, self._modules.mid
        maps = F.embedding(tokens, self._table).unflatten(1, grid).permute(0, 3, 1, 2)  # channels last as it comes
        maps = _residual(mid.block_1, decoder.conv_in(maps))
        maps = _residual(mid.block_2, mid.attn_1(maps))
        for index, level in enumerate(decoder.up):
            for which, block in enumerate(level.block):
                maps = _residual(block, maps) if which in self._blocks[index] else maps
                if len(level.attn):
                    maps = level.attn[which](maps)
            if index < len(self._upsample):
                maps = F.conv_transpose2d(maps, *self._upsample[index], stride=2, padding=1)
        return decoder.conv_out(_norm_silu(decoder.norm_out, maps))


def upsampling_kernel(weight: Tensor) -> Tensor:
    """Kernel of the transposed convolution, stride 2 and padding 1, that doubles a map and convolves it at once.

    A 3x3 kernel over doubled pixels sees each pixel up to twice a side, so an output has 4 taps and not 9.
    [O, I, 3, 3] -> [I, O, 4, 4].
    """
    taps = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # [4, 3], sums along a side
    return torch.einsum("oiyx,ay,bx->ioab", weight, taps, taps).contiguous(memory_format=torch.channels_last)


def _adds(block: Any) -> bool:
    """Whether a residual block does more than give back what it gets, as one does whose last convolution is zero."""
    last = block.conv2
    return block.in_channels != block.out_channels or bool(last.weight.any()) or bool(last.bias.any())


def _residual(block: Any, maps: Tensor) -> Tensor:
    inner = block.conv1(_norm_silu(block.norm1, maps))
    inner = block.conv2(_norm_silu(block.norm2, inner))
    if block.in_channels != block.out_channels:
        maps = block.conv_shortcut(maps) if block.use_conv_shortcut else block.nin_shortcut(maps)
    return inner.add_(maps)


def _norm_silu(norm: Any, maps: Tensor) -> Tensor:
    if maps.device.type == "cpu" and maps.shape[2] * maps.shape[3] < FEW_PIXELS:
        maps = maps.contiguous()
    return F.silu(norm(maps), inplace=True)
