"""The contract between engines, learner and a token rule: which distribution each image token is drawn from."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stage_ray.config import Section

if TYPE_CHECKING:
    from stage_ray.samplers.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Context:
    """Where in its image each of B tokens stands.

    Attributes:
        positions: int64 [B], 0 for an image's first token.
        sequences: int64 [B, T], the images' tokens; what stands at a token's own position and after it means nothing.
    """

    positions: Tensor
    sequences: Tensor

    @property
    def tokens(self) -> Tensor:
        """The tokens so far: int64 [B, T], -1 at each token's own position and after it.

        Example:
            >>> Context(torch.tensor([1, 0]), torch.tensor([[7, 8], [5, 6]])).tokens.tolist()
            [[7, -1], [-1, -1]]
        """
        columns = torch.arange(self.sequences.shape[-1], device=self.sequences.device)
        return self.sequences.masked_fill(columns >= self.positions.unsqueeze(-1), -1)


class TokenRule(Section):
    """From logits to the distribution that tokens are drawn from. Its fields are its options, checked by pydantic.

    Engines draw from it and record its log-probabilities and entropy; the learner makes it again from teacher-forced
    logits, some tokens at a time. So `logits` must be differentiable, and a pure function of its arguments, each row by
    itself: that keeps an image a function of its seed and the logits, whatever else is in the batch.

    Example: `stage_ray.samplers.entropy_informed`.
    """

    @abstractmethod
    def logits(
        self, conditional: Tensor, unconditional: Tensor | None, params: SamplingParams, context: Context
    ) -> Tensor:
        """Logits of the distribution, float32 [B, V]; minus infinity for what cannot be drawn.

        Args:
            conditional: float32 [B, V].
            unconditional: float32 [B, V]; None where ``params.guided`` is False.
            params: of the config; `SamplingParams.guide` and `SamplingParams.truncate` apply guidance, top-k and top-p.
            context: of the B tokens.
        """
