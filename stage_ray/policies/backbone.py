"""The part of a family that is trained and sharded: embeddings and language model, from prompts to states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from stage_ray.policies.codec import Branch


class Backbone(nn.Module):
    """Embeds prompt ids, puts image embeddings in their places, and runs the language model, a decoder of transformers.

    For any other model a family overrides `layers` and `forward`.
    """

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    @property
    def layers(self) -> list[nn.Module]:
        """The language model's layers, in order."""
        return list(self.language_model.layers)  # type: ignore[arg-type]

    def predict(self, prompts: Sequence[Sequence[int]], image_embeds: Tensor) -> Tensor:
        """States that predict each image token: B prompts, embeddings [B, T - 1, hidden] -> [B, T, hidden].

        Each row is its prompt, its image tokens but the last, and padding, which causal attention needs no mask for.
        """
        device, length = image_embeds.device, image_embeds.shape[1] + 1
        longest = max(map(len, prompts))
        ids = [[*prompt, *[0] * (longest + length - 1 - len(prompt))] for prompt in prompts]
        starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
        positions = starts[:, None] + torch.arange(length - 1, device=device)  # [B, T - 1], of the image tokens
        states = self(torch.tensor(ids, device=device), image_embeds, positions)
        # The state at a prompt's last token predicts the first image token.
        predicting = (starts[:, None] - 1 + torch.arange(length, device=device)).unsqueeze(-1)
        return states.gather(1, predicting.expand(-1, -1, states.shape[-1]))  # [B, T, hidden]

    def forward(self, ids: Tensor, image_embeds: Tensor, positions: Tensor) -> Tensor:
        """Ids int64 [B, L], embeddings [B, T - 1, hidden] and where they belong int64 [B, T - 1] -> [B, L, hidden]."""
        embeds = self.language_model.embed_tokens(ids)  # type: ignore[operator]
        places = positions.unsqueeze(-1).expand_as(image_embeds)
        embeds = embeds.scatter(1, places, image_embeds.to(embeds.dtype))  # out of place: embeds may need a gradient
        return self.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state


def embed_ids(embedding: nn.Module, prompts: Sequence[Branch]) -> Tensor:
    """Prompts whose entries are ids of an embedding, one after the other: [all their entries, hidden]."""
    device = next(embedding.parameters()).device
    return embedding(torch.tensor([entry for prompt in prompts for entry in prompt], device=device))
