"""A Llama forward with a static key-value cache over the modules of transformers, with no copies of weights.

It computes what ``LlamaModel`` computes with a third of the operator calls of a step, and reads every prompt once.
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
        self._llama, self._rows, self._length = llama, rows, length
        self._kv_heads, self._head_dim = config.num_key_value_heads, config.head_dim
        self._used = 0  # positions of the cache that are set

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read B prompts, each different one once; the state of each sequence's last token, [B, hidden]."""
        # Index of each different prompt, in order of first appearance.
        different = {prompt: index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        device, count = self._llama.embed_tokens.weight.device, max(map(len, different))
        owners = torch.tensor([different[tuple(prompt)] for prompt in prompts], device=device)  # [B]
        padding = torch.tensor([count - len(prompt) for prompt in different], device=device)  # [N], on the left
        ids = torch.tensor([[0] * (count - len(prompt)) + list(prompt) for prompt in different], device=device)
        embeds = self._llama.embed_tokens(ids)  # [N, count, hidden]
        slots = torch.arange(self._length, device=device)
        real = slots >= padding[:, None]  # [N, length]
        # Padding attends to itself: a softmax over nothing is NaN.
        causal = slots[:count, None] >= slots[:count]  # [count, count]
        own = torch.eye(count, dtype=torch.bool, device=device)
        mask = (causal & real[:, None, :count]) | own  # [N, count, count]
        positions = (slots - padding[:, None]).clamp(min=0)  # [N, length], 0 in the padding
        cos, sin = self._llama.rotary_emb(embeds, positions)  # [N, length, D]
        self._angles = cos.unsqueeze(1), sin.unsqueeze(1)  # [N, 1, length, D], alike for all heads
        self._cache = self._new_cache(len(different), count)
        states = self._forward(embeds, mask[:, None])[:, -1]
        # From one cache a prompt to one a sequence, long enough for the image.
        read, self._cache = self._cache, self._new_cache(self._rows, self._length)
        for of_rows, of_prompts in zip(self._cache, read, strict=True):
            of_rows[:, :, :, :count] = of_prompts[:, owners]  # layer by layer, to save memory
        self._angles = self._angles[0][owners], self._angles[1][owners]
        self._mask = real[owners][:, None, None] if bool(padding.any()) else None  # None: nothing to mask
        return states[owners]

    def _new_cache(self, rows: int, length: int) -> Tensor:
        """Unset keys and values of every layer, [layers, 2, rows, kv heads, length, D]."""
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
        start, self._used = self._used, self._used + hidden.shape[1]
        shape = (*hidden.shape[:2], -1, self._head_dim)
        cos, sin = (angle[:, :, start : self._used] for angle in self._angles)
        for layer, (keys, values) in zip(self._llama.layers, self._cache, strict=True):
            normed, attention = _rms_norm(layer.input_layernorm, hidden), layer.self_attn
            query, key, value = (  # [rows, heads or kv heads, positions, D] each
                project(normed).view(*shape).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys[:, :, start : self._used] = _rotate(key, cos, sin)
            values[:, :, start : self._used] = value
            query = _rotate(query, cos, sin).to(keys.dtype)  # float32 on a CPU
            read = keys[:, :, : self._used], values[:, :, : self._used]
            mixed = self._mix(query, *read, mask, attention.scaling).to(hidden.dtype)
            hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(_rms_norm(layer.post_attention_layernorm, hidden))
        return _rms_norm(self._llama.norm, hidden)

    def _mix(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention: query [B, heads, L, D] over keys and values [B, kv heads, S, D] -> [B, heads, L, D]."""
        rows, heads, length, _ = query.shape
        if length > 1:
            grouped = heads != self._kv_heads
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
        # One query a row: fused kernels are built for many; here two batched products are faster. Query heads that
        # share a key head stand in as that head's queries.
        query = query.reshape(rows, self._kv_heads, -1, self._head_dim)  # [B, kv heads, queries a key head, D]
        scores = torch.matmul(query * scale, keys.transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return torch.matmul(scores.softmax(dim=-1), values).reshape(rows, heads, 1, self._head_dim)


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], module.weight, module.variance_epsilon)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves rotated against each other as Llama's checkpoints expect."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin
