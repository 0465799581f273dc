"""TPSO: prompts of one group moved apart in embedding space, as far as their meaning allows (arXiv 2511.19811).

Offsets D_i of a prompt's embeddings e, one for each of n images, begin as ``1e-4 N(0, 1)`` and minimise with RMSprop

``sum_i (max(0, (kappa - tau) - c_i) + max(0, c_i - (kappa + tau))) + diversity L``

where ``L = (|sum_i z_i|^2 - n) / (n (n - 1)) - 1``, z_i is ``pool(e + D_i)`` at unit length, and c_i its cosine to
``pool(e)``: each moves until it is as like the prompt as the band ``kappa +- tau`` says, and away from the others. One
that is inside the band stops; L of those that go on, a of them, is that of their own z_i times n / a.

Derived from the paper; its code was not read. It moves a diffusion model's prompts and fades the offsets out, linearly
over the first 40 % of the steps, which a prompt in a key-value cache cannot: here the share ``mix`` of them stays, by
default what the fade leaves on average over all steps. The pooled state is the mean of the language model's last hidden
states over the prompt. An image that is not inside the band after all steps has the offsets that came nearest to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from stage_ray.samplers.base import EmbeddingTransform

START = 1e-4  # standard deviation of the first offsets


class TpsoTransform(EmbeddingTransform):
    """Diverse images of one prompt, at the cost of ``steps`` forward and backward passes of G prompts a group."""

    kappa: float = Field(0.8, gt=-1, lt=1, description="Cosine of a moved prompt's pooled state and the prompt's own")
    tau: float = Field(0.01, gt=0, description="Half the width of the band around kappa where an image stops")
    diversity: float = Field(1.0, ge=0, description="Weight of the images' mean cosine to each other")
    lr: float = Field(0.01, gt=0, description="Learning rate of RMSprop")
    steps: int = Field(50, ge=1, description="Steps of RMSprop at most")
    mix: float = Field(0.2, ge=0, le=1, description="Share of the offsets that images are generated from")

    def move(self, embeds: Tensor, pool: Callable[[Tensor], Tensor], seeds: Sequence[int]) -> Tensor:
        """See `EmbeddingTransform.move`."""
        base = embeds.detach().float()
        offsets = torch.stack([_noise(seed, base) for seed in seeds]).requires_grad_()  # [G, L, hidden]
        optimiser = torch.optim.RMSprop([offsets], lr=self.lr)
        with torch.no_grad():
            anchor = normalize(pool(base[None]), dim=-1)  # [1, hidden]
        best, nearest = offsets.detach().clone(), base.new_full((len(seeds),), torch.inf)
        for step in range(self.steps + 1):
            pooled = normalize(pool(base + offsets), dim=-1)  # [G, hidden]
            outside = self._outside((pooled * anchor).sum(-1))
            nearer = outside.detach() < nearest
            best[nearer], nearest[nearer] = offsets.detach()[nearer], outside.detach()[nearer]
            active = nearest > 0
            if step == self.steps or not active.any():
                break
            loss = outside.sum() + self.diversity * likeness(pooled[active], len(seeds))
            optimiser.zero_grad()
            loss.backward()
            assert offsets.grad is not None
            offsets.grad.mul_(active[:, None, None])  # RMSprop does not move what has no gradient
            optimiser.step()
        return base + self.mix * best

    def _outside(self, cosines: Tensor) -> Tensor:
        """How far cosines are from the band."""
        below, above = self.kappa - self.tau - cosines, cosines - self.kappa - self.tau
        return below.clamp(min=0) + above.clamp(min=0)


def likeness(pooled: Tensor, count: int) -> Tensor:
    """Mean cosine, less 1, of every two of ``count`` vectors, of which these stand for all: unit length, [a, hidden].

    Example:
        >>> likeness(torch.eye(2), 2)
        tensor(-1.)
    """
    total = pooled.sum(0) * (count / len(pooled))
    return (total.square().sum() - count) / max(1, count * (count - 1)) - 1


def _noise(seed: int, base: Tensor) -> Tensor:
    """First offsets of an image, of its seed alone: float32 [L, hidden]."""
    generator = torch.Generator().manual_seed(seed)
    return START * torch.randn(base.shape, generator=generator).to(base.device)
