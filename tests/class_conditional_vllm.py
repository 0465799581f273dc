"""The model of `tests.class_conditional` in vLLM, whose 1-D positions the model itself turns into rows and columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from tests.class_conditional import Sizes, rotary_2d, rotate


class Block(nn.Module):
    """`tests.class_conditional.Block` over paged attention."""

    def __init__(self, sizes: Sizes, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        hidden, width, inner = sizes.hidden, sizes.hidden // sizes.heads, sizes.intermediate
        self.width = width
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.qkv = QKVParallelLinear(hidden, width, sizes.heads, bias=False, prefix=f"{prefix}.qkv")
        self.out = RowParallelLinear(hidden, hidden, bias=False, prefix=f"{prefix}.out")
        self.up = ColumnParallelLinear(hidden, inner, bias=False, prefix=f"{prefix}.up")
        self.down = RowParallelLinear(inner, hidden, bias=False, prefix=f"{prefix}.down")
        self.attention = Attention(
            self.qkv.num_heads,
            width,
            width**-0.5,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attention",
        )

    def forward(self, states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """States [N, hidden] of all running requests -> the same shape."""
        query, keys, values = self.qkv(self.norm1(states))[0].chunk(3, dim=-1)
        query, keys = (rotate(x.unflatten(-1, (-1, self.width)), angles).flatten(-2) for x in (query, keys))
        states = states + self.out(self.attention(query, keys, values))[0]
        return states + self.down(F.silu(self.up(self.norm2(states))[0]))[0]


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0})
class Transformer(nn.Module):
    """Ids to states: embedding included, as vLLM captures what lies inside (`JanusForImageGeneration`)."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        said = vllm_config.model_config.hf_config.sizes  # of `ClassCodec.vllm_spec`
        sizes = Sizes(**{**said, "grid": tuple(said["grid"])})
        self.codes, self.columns, self.width = sizes.codes, sizes.grid[1], sizes.hidden // sizes.heads
        self.class_embedding = nn.Embedding(len(sizes.classes) + 1, sizes.hidden)
        self.token_embedding = nn.Embedding(sizes.codes, sizes.hidden)
        self.blocks = nn.ModuleList(Block(sizes, vllm_config, f"{prefix}.blocks.{n}") for n in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden, eps=1e-5)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Ids [N] -> embeddings [N, hidden]: below V an image token, from V on a class."""
        tokens = self.token_embedding(input_ids.clamp(max=self.codes - 1))
        classes = self.class_embedding(
            (input_ids - self.codes).clamp(min=0, max=self.class_embedding.num_embeddings - 1)
        )
        return torch.where((input_ids < self.codes).unsqueeze(-1), tokens, classes)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids and positions [N] -> states [N, hidden]."""
        states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        cos, sin = rotary_2d(positions, self.columns, self.width)
        for block in self.blocks:
            states = block(states, (cos.unsqueeze(-2), sin.unsqueeze(-2)))
        return self.norm(states)


class ClassForImageGeneration(nn.Module):
    """Ids and positions in, logits over the V image tokens out."""

    mapper = WeightsMapper(
        orig_to_new_prefix={
            "vq.": None,
            "gpt.token_embedding.": "transformer.token_embedding.",
            "gpt.": "",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.transformer = Transformer(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "transformer"))
        self.head = nn.Linear(self.config.hidden_size, self.config.sizes["codes"], bias=False)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Ids [N] -> embeddings [N, hidden]."""
        return self.transformer.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids and positions [N] of all running requests -> states [N, hidden]."""
        return self.transformer(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """States [R, hidden] -> logits [R, V]."""
        return self.head(hidden_states.to(self.head.weight.dtype)).float()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors by their names in a checkpoint."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.mapper)
