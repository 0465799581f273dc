"""What the torch engine asks of a family beside its backbone's forward: a cached one, and prompts by embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from stage_ray.policies.codec import Branch


class Decoder(Protocol):
    """A forward of the backbone with a key-value cache, for one batch of B sequences."""

    def prefill(self, prompts: Sequence[Branch], embeds: Mapping[int, Tensor] = {}) -> Tensor:
        """Read B prompts; the state that predicts each first image token, [B, hidden].

        ``embeds``, float [entries, hidden] by number of a sequence, are read in the place of that prompt's own. The
        engine gives none where the backbone is no `EmbedsPrompts`; such a decoder needs no such argument.
        """

    def step(self, embeds: Tensor) -> Tensor:
        """Read the embedding of each sequence's newest token, [B, hidden]; the state that predicts the next one."""


@runtime_checkable
class EmbedsPrompts(Protocol):
    """A backbone whose prompts may be moved: what `stage_ray.samplers.EmbeddingTransform` needs of a family."""

    def embed_prompts(self, prompts: Sequence[Branch]) -> Tensor:
        """Different prompts, one after the other, to the layers' inputs, [all their entries, hidden]."""

    def prompt_states(self, embeds: Tensor) -> Tensor:
        """Last hidden states of n prompts of one length: [n, L, hidden] -> [n, L, hidden], differentiable."""
