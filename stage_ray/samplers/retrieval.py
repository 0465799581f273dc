"""Retrieval at each token (AR-RAG's DAiD, arXiv 2506.06962): tokens that stood beside like neighbours in real pictures.

``p = (1 - lam) softmax(l / T) + lam softmax(-d / tau)``: l are the guided logits, d is the squared distance from the
neighbours of the token to be drawn to those of the nearest patch of an index that has the token (`PatchIndex`). A token
that none of the ``k`` nearest patches has gets nothing of the second part. Tokens of the first row, and of the left and
right edge, lack neighbours and are drawn as `guided` draws them.

The released code keeps neighbours of the index as latents; here they are codes, which take a tenth of the room.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from stage_ray.errors import ConfigError
from stage_ray.samplers.base import Context, ImageTokens, TokenRule
from stage_ray.samplers.entropy_informed import LOWEST
from stage_ray.samplers.guided import GuidedRule
from stage_ray.samplers.patch_index import cached_index, load_index

if TYPE_CHECKING:
    from stage_ray.samplers.params import SamplingParams

KEY = "rollout.sampler_options.index"
SAME = 1e-3  # codebook vectors that differ by less are the same ones, rounded otherwise


class RetrievalRule(TokenRule):
    """Guidance, temperature, top-k and top-p, then the mixture with what an index has beside such neighbours."""

    index: str = Field(description="File of `stage-ray index`, made with the image tokenizer of this model")
    lam: float = Field(0.1, ge=0, lt=1, description="Share of the retrieved distribution; 0 is off, as published")
    tau: float = Field(1.0, gt=0, description="Temperature of the distances")
    k: int = Field(2048, ge=1, description="Nearest patches that count")
    probes: int = Field(4096, ge=1, description="Inverted lists that are searched, where the index has some")

    def logits(
        self, conditional: Tensor, unconditional: Tensor | None, params: SamplingParams, context: Context
    ) -> Tensor:
        """See `TokenRule.logits`."""
        logits = GuidedRule().logits(conditional, unconditional, params, context)
        if not self.lam or not context.sequences.shape[-1]:
            return logits
        index = cached_index(self.index, KEY, logits.device)
        queries, inside = neighbours(context, index.grid)
        far = index.nearest(queries, self.k, self.probes)  # [B, V]
        inside &= far.isfinite().any(dim=-1)
        retrieved = (far.masked_fill(~inside.unsqueeze(-1), 0.0) / -self.tau).log_softmax(dim=-1)
        # Not minus infinity, of which the gradient of a sum of two is NaN.
        own = logits.log_softmax(dim=-1).clamp(min=LOWEST)
        mixed = torch.logaddexp(own + math.log1p(-self.lam), retrieved + math.log(self.lam))
        mixed = mixed.masked_fill(logits.isneginf() & retrieved.isneginf(), -torch.inf)
        return torch.where(inside.unsqueeze(-1), mixed, logits)

    def check(self, codec: ImageTokens, *, loaded: bool = False) -> None:
        """See `TokenRule.check`: the index must be of the model's own image tokenizer."""
        index, fix = load_index(self.index, KEY), "make one with stage-ray index of this model"
        has, wants = (*index.grid, len(index.codebook)), (*codec.grid, codec.codebook_size)
        if has != wants:
            of = "tokens of {} x {}, {} codes".format
            raise ConfigError(f"{KEY} = {self.index!r} is of {of(*has)}, and the model of {of(*wants)}; {fix}")
        if loaded:
            cached_index.cache_clear()  # of an earlier engine of this process, whose file may be another by now
            own = codec.codebook().cpu()
            if own.shape != index.codebook.shape or (own - index.codebook).abs().max() > SAME:
                raise ConfigError(f"{KEY} = {self.index!r} is of an image tokenizer with another codebook; {fix}")


def neighbours(context: Context, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The tokens at the upper left, above, at the upper right and at the left of B tokens.

    Returns:
        int64 [B, 4], and bool [B]: all four are there. Where one is not, the four mean nothing.
    """
    columns, positions = grid[1], context.positions
    row, column = positions // columns, positions % columns
    inside = (row >= 1) & (column >= 1) & (column <= columns - 2)
    back = torch.tensor([columns + 1, columns, columns - 1, 1], device=positions.device)
    places = (positions.unsqueeze(-1) - back).clamp(min=0)
    return context.sequences.gather(-1, places), inside
