"""A Llama forward with a static key-value cache over the modules of transformers: no copies of weights, few calls.

It computes what ``LlamaModel`` computes (tests hold it to that) with about a third of the operator calls per step,
which is what time goes to in a tiny model, and reads every prompt once, however many rows share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaModel


class StaticDecoder:
    """Prefill once, then step token by token, for one batch of B sequences.

    Prompts of different lengths are padded on the left; padding is masked and positions count from each prompt's first
    real token, so a sequence's result does not depend on its padding.

    Args:
        rows: B.
        length: positions of the cache, prompt and image.
    """

    def __init__(self, llama: LlamaModel, rows: int, length: int) -> None:
        config = llama.config
        self._llama = llama
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = config.head_dim
        self._rows, self._length = rows, length
        self._used = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read B prompts, each different one once; the state of each sequence's last token, [B, hidden]."""
        # Index of each different prompt, in order of first appearance.
        different = {prompt: index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        device = self._llama.embed_tokens.weight.device
        owners = torch.tensor([different[tuple(prompt)] for prompt in prompts], device=device)
        longest = max(map(len, different))
        padding = torch.tensor([longest - len(prompt) for prompt in different], device=device)
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in different], device=device)
        return self._prefill(self._llama.embed_tokens(ids), padding, owners)

    def _prefill(self, embeds: Tensor, padding: Tensor, owners: Tensor) -> Tensor:
        """Embeddings [N, P, hidden] of N prompts, masked tokens on the left of each int64 [N], each sequence's prompt
        int64 [B] -> states [B, hidden]."""
        different, count = embeds.shape[:2]
        slots = torch.arange(self._length, device=embeds.device)
        real = slots >= padding[:, None]  # [N, length]
        # Padding attends to itself: a softmax over nothing is NaN.
        causal = slots[:count, None] >= slots[:count]
        own = torch.eye(count, dtype=torch.bool, device=embeds.device)
        mask = (causal & real[:, None, :count]) | own
        positions = (slots - padding[:, None]).clamp(min=0)
        cos, sin = self._llama.rotary_emb(embeds, positions)  # [N, length, D]
        self._angles = cos.unsqueeze(1), sin.unsqueeze(1)
        self._cache = self._new_cache(different, count)
        states = self._forward(embeds, mask[:, None])[:, -1]
        read, self._cache = self._cache, self._new_cache(self._rows, self._length)
        for of_rows, of_prompts in zip(self._cache, read, strict=True):
            of_rows[:, :, :, :count] = of_prompts[:, owners]
        self._angles = self._angles[0][owners], self._angles[1][owners]
        self._mask = real[owners][:, None, None] if bool(padding.any()) else None
        return states[owners]

    def _new_cache(self, rows: int, length: int) -> Tensor:
        """Keys and values of every layer, [layers, 2, rows, kv heads, length, D]; nothing is read before it is set."""
        weight = self._llama.embed_tokens.weight
        # A CPU multiplies small bfloat16 matrices slower than float32 ones, and attention is nothing but small ones.
        dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        shape = (len(self._llama.layers), 2, rows, self._kv_heads, length, self._head_dim)
        return torch.empty(shape, dtype=dtype, device=weight.device)

    def step(self, embeds: Tensor) -> Tensor:
        """Read one more token of each row: embeds [B, hidden] -> state [B, hidden]."""
        mask = None if self._mask is None else self._mask[..., : self._used + 1]
        return self._forward(embeds[:, None], mask)[:, -1]

    def _forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        start, end = self._used, self._used + hidden.shape[1]
        cos, sin = (angle[:, :, start:end] for angle in self._angles)
        for index, layer in enumerate(self._llama.layers):
            normed = _rms_norm(layer.input_layernorm, hidden)
            hidden = hidden + self._attend(layer.self_attn, index, normed, cos, sin, mask, end)
            normed = _rms_norm(layer.post_attention_layernorm, hidden)
            hidden = hidden + layer.mlp(normed)
        self._used = end
        return _rms_norm(self._llama.norm, hidden)

    def _attend(
        self,
        attention: Any,  # transformers' LlamaAttention
        index: int,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        end: int,
    ) -> Tensor:
        rows, count, _ = hidden.shape
        query = attention.q_proj(hidden).view(rows, count, self._heads, self._head_dim).transpose(1, 2)
        key = attention.k_proj(hidden).view(rows, count, self._kv_heads, self._head_dim).transpose(1, 2)
        value = attention.v_proj(hidden).view(rows, count, self._kv_heads, self._head_dim).transpose(1, 2)
        keys, values = self._cache[index]
        keys[:, :, end - count : end] = _rotate(key, cos, sin)
        values[:, :, end - count : end] = value
        query = _rotate(query, cos, sin).to(keys.dtype)
        mixed = self._mix(query, keys[:, :, :end], values[:, :, :end], mask, attention.scaling).to(hidden.dtype)
        return attention.o_proj(mixed.transpose(1, 2).reshape(rows, count, -1))

    def _mix(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention: query [B, heads, L, D] over keys and values [B, kv heads, S, D] -> [B, heads, L, D]."""
        if query.shape[2] > 1:
            grouped = self._heads != self._kv_heads
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
        # One query a row: fused kernels are built for many; here two batched products are faster. Query heads that
        # share a key head stand in as that head's queries.
        query = query.reshape(query.shape[0], self._kv_heads, -1, self._head_dim)
        scores = torch.matmul(query * scale, keys.transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        mixed = torch.matmul(scores.softmax(dim=-1), values)
        return mixed.reshape(query.shape[0], self._heads, 1, self._head_dim)


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], module.weight, module.variance_epsilon)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves rotated against each other as Llama's checkpoints expect."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin
