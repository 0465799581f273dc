"""LlamaGen's rotary positions: of a head's pairs half turn with the row of an image token, half with its column."""

from __future__ import annotations

import torch
from torch import Tensor


def angles(positions: Tensor, prompt: int, side: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [..., D / 2], of positions int64 [...]; both are 0 at the ``prompt`` first positions.

    Zeros take queries and keys away there, so a prompt's entries have neither order nor weight of their own.
    """
    frequencies = 1.0 / base ** (torch.arange(0, width // 2, 2, device=positions.device).float() / (width // 2))
    place = (positions - prompt).clamp(min=0)
    row_column = torch.stack((place // side, place % side), dim=-1).float()  # [..., 2]
    turns = (row_column.unsqueeze(-1) * frequencies).flatten(-2)  # [..., D / 2]
    image = (positions >= prompt).unsqueeze(-1).float()
    return turns.cos() * image, turns.sin() * image
