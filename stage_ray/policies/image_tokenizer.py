"""The image tokenizer that LlamaGen published and Janus uses too: transformers' ``JanusVQVAE``, loaded and decoded.

Pictures are what ``JanusVQVAE.decode`` computes, up to rounding, in fewer operations. Tokens are what LlamaGen's own
code gives: it scales latents to unit length before it looks for the nearest code, which ``JanusVQVAE.encode`` omits.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage_ray.errors import ConfigError
from stage_ray.pretrained import read_tensors

if TYPE_CHECKING:
    from transformers import JanusVQVAE, JanusVQVAEConfig

DECODE_CHUNK = 16  # images decoded at once: bounds the memory of full-size feature maps
CPU_DECODE_CHUNK = 4  # whose maps stay in caches, and in memory that the allocator need not ask for anew
PUBLISHED = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^encoder\.conv_blocks\.(\d+)\.res\.", r"encoder.down.\1.block."),
        (r"^encoder\.conv_blocks\.", "encoder.down."),
        (r"^decoder\.conv_blocks\.(\d+)\.res\.", r"decoder.up.\1.block."),
        (r"^decoder\.conv_blocks\.", "decoder.up."),
        (r"^(encoder|decoder)\.mid\.0\.", r"\1.mid.block_1."),
        (r"^(encoder|decoder)\.mid\.1\.", r"\1.mid.attn_1."),
        (r"^(encoder|decoder)\.mid\.2\.", r"\1.mid.block_2."),
    )
]
"""The first pattern that a tensor's name in LlamaGen's ``VQModel`` matches gives its new beginning; others stay."""
FEW_PIXELS = 1024  # below it torch's GroupNorm of channels-last maps is not vectorised on a CPU


def renamed(name: str) -> str:
    """What transformers calls a tensor of LlamaGen's ``VQModel``."""
    found = next(((pattern, new) for pattern, new in PUBLISHED if pattern.match(name)), None)
    return name if found is None else found[0].sub(found[1], name)


def load_tokenizer(location: Path, config: JanusVQVAEConfig, prefix: str, device: torch.device) -> JanusVQVAE:
    """The image tokenizer of a checkpoint whose names begin with ``prefix``, frozen, for pictures.

    Raises:
        ConfigError: a tensor is missing.
    """
    from transformers import JanusVQVAE  # late: it takes seconds

    vqmodel = JanusVQVAE(config)
    fill(vqmodel, location, prefix)
    return for_sampling(vqmodel.to(device))


def fill(module: nn.Module, location: Path, prefix: str) -> None:
    """Put a checkpoint's tensors whose names begin with ``prefix`` into a module, which is frozen then.

    Raises:
        ConfigError: a tensor is missing.
    """
    tensors = {k.removeprefix(prefix): v for k, v in read_tensors(location, (prefix,)).items()}
    missing, _ = module.load_state_dict(tensors, strict=False)  # unexpected names do no harm
    if missing:
        lacking = f"{len(missing)} tensors, the first is {prefix}{missing[0]}"
        raise ConfigError(f"policy.path: {location} lacks {lacking}")
    module.requires_grad_(False)


def for_sampling(vqmodel: JanusVQVAE) -> JanusVQVAE:
    """In float32 (pictures do not come from rounded weights), channels last: a CPU convolves faster so."""
    return vqmodel.to(dtype=torch.float32, memory_format=torch.channels_last).eval()


def codebook(vqmodel: JanusVQVAE) -> Tensor:
    """Codebook vectors as the decoder gets them, float32 [V, D]: ``get_codebook_entry`` scales each to length 1."""
    return F.normalize(vqmodel.quantize.embedding.weight.detach().float(), p=2, dim=-1)


@torch.no_grad()
def decode(vqmodel: JanusVQVAE, tokens: Tensor, grid: tuple[int, int], *, rounded: bool = False) -> Tensor:
    """Tokens int64 [B, T] -> images uint8 [B, H, W, 3] on the CPU; the decoder speaks -1..1.

    ``rounded``: to the nearest grey level, else down, as the family's own code does.
    """
    decoder, device = PictureDecoder(vqmodel), vqmodel.quantize.embedding.weight.device
    size, shift = CPU_DECODE_CHUNK if device.type == "cpu" else DECODE_CHUNK, 0.5 if rounded else 0.0
    chunks = [decoder(chunk.to(device), grid) for chunk in tokens.split(size)]  # [chunk, 3, H, W], -1..1
    greys = [((chunk.float() + 1) * 127.5 + shift).clamp(0, 255).to(torch.uint8).cpu() for chunk in chunks]
    return torch.cat(greys).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def encode(vqmodel: JanusVQVAE, images: Tensor) -> Tensor:
    """Images uint8 [B, H, W, 3] -> tokens int64 [B, T] on the CPU; the encoder reads -1..1.

    A token is the code of largest cosine, which of vectors of unit length is the nearest.
    """
    device, codes = vqmodel.quantize.embedding.weight.device, codebook(vqmodel)
    found = []
    for chunk in images.split(CPU_DECODE_CHUNK if device.type == "cpu" else DECODE_CHUNK):
        pixels = chunk.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = vqmodel.quant_conv(vqmodel.encoder(pixels))  # [chunk, D, rows, columns]; their length says nothing
        found.append((latents.permute(0, 2, 3, 1).flatten(1, 2) @ codes.T).argmax(dim=-1).cpu())
    return torch.cat(found)


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
