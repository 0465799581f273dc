"""Emu3's language model, a Llama by arithmetic, over images whose rows end in a token that is read and never drawn."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stage_ray.policies.backbone import embed_ids
from stage_ray.policies.codec import Branch
from stage_ray.policies.llama import LlamaBackbone
from stage_ray.policies.static_decoder import StaticDecoder

if TYPE_CHECKING:
    from transformers import Emu3ForConditionalGeneration, Emu3VQVAE
    from transformers.models.emu3.modeling_emu3 import Emu3TextModel


class Emu3Backbone(LlamaBackbone):
    """Puts the embedding that closes a row behind each row but the last, and drops the states that predict it.

    The embeddings of text, of image tokens and of what closes a row are one table. It is kept outside of the backbone:
    ranks gather it by itself, wherever it is called.
    """

    def __init__(self, text_model: Emu3TextModel, grid: tuple[int, int], row_end: int) -> None:
        without: Any = copy(text_model)
        without._modules = {name: module for name, module in text_model._modules.items() if name != "embed_tokens"}
        super().__init__(without)
        self._table = (text_model.embed_tokens,)  # in a tuple torch does not find it
        self._grid, self._row_end = grid, row_end

    def embed_prompts(self, prompts: Sequence[Branch]) -> Tensor:
        """See `LlamaBackbone.embed_prompts`."""
        return embed_ids(self._table[0], prompts)

    def embed_row_end(self) -> Tensor:
        """What closes a row, [1, hidden]."""
        return embed_ids(self._table[0], [(self._row_end,)])

    def predict(self, prompts: Sequence[Sequence[int]], image_embeds: Tensor) -> Tensor:
        """As `Backbone.predict`: embeddings of all image tokens but the last -> [B, T, hidden]."""
        rows, columns = self._grid
        end = self.embed_row_end().to(image_embeds.dtype)
        last = end.expand(len(image_embeds), 1, -1)  # stands for the last token, which nothing reads
        images = torch.cat([image_embeds, last], dim=1).unflatten(1, self._grid)  # [B, rows, columns, hidden]
        closed = torch.cat([images, end.expand(len(images), rows, 1, -1)], dim=2).flatten(1, 2)
        states = super().predict(prompts, closed[:, :-2])  # [B, rows * (columns + 1) - 1, hidden]
        tokens = torch.arange(rows * columns, device=states.device)
        return states.index_select(1, tokens + tokens // columns)


class RowEndDecoder(StaticDecoder):
    """A `StaticDecoder` that also reads what closes a row, after each row's last token."""

    def __init__(self, text_model: Emu3TextModel, backbone: Emu3Backbone, rows: int, length: int, columns: int) -> None:
        """For so many sequences of at most ``length`` positions, those of row ends included."""
        super().__init__(text_model, rows, length, backbone.embed_prompts)  # as a Llama's
        self._row_end, self._columns, self._read = backbone.embed_row_end(), columns, 0

    def step(self, embeds: Tensor) -> Tensor:
        """Read one more image token of each sequence: embeds [B, hidden] -> state [B, hidden]."""
        self._read += 1
        state = super().step(embeds)
        return state if self._read % self._columns else super().step(self._row_end.expand_as(embeds))


class Emu3Parts(nn.Module):
    """The parts of transformers' model under the names that `save_pretrained` gives them in a checkpoint."""

    def __init__(self, model: Emu3ForConditionalGeneration) -> None:
        super().__init__()
        self.text_model = nn.ModuleDict({"model": model.model.text_model, "lm_head": model.lm_head})
        self.vqmodel: Emu3VQVAE | None = model.model.vqmodel


def image_head(lm_head: nn.Linear, first: int, codes: int) -> nn.Linear:
    """The rows of a head that are image tokens, in float32, as a head of their own."""
    head = nn.Linear(lm_head.in_features, codes, bias=False, device="meta")
    head.weight = nn.Parameter(lm_head.weight.detach()[first : first + codes].float().clone(), requires_grad=False)
    return head
