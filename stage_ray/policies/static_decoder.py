"""A Llama forward with a static key-value cache over the modules of transformers.

It computes what ``LlamaModel`` computes with a quarter of the operator calls of a step, and reads every prompt once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stage_ray.policies.backbone import embed_ids
from stage_ray.policies.codec import Branch
from stage_ray.policies.packed import PackedLinear

if TYPE_CHECKING:
    from transformers import LlamaModel


@dataclass(frozen=True, slots=True)
class _Layer:
    """The products of one layer, and the modules that hold its norms' weights."""

    input_norm: Any
    qkv: PackedLinear
    out: PackedLinear
    mlp_norm: Any
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear
    scale: float  # of attention scores

    @classmethod
    def of(cls, layer: Any, rows: int) -> _Layer:
        own, mlp = layer.self_attn, layer.mlp
        qkv = PackedLinear([own.q_proj, own.k_proj, own.v_proj], rows)
        others = (PackedLinear([one], rows) for one in (own.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        out, gate, up, down = others
        norms = layer.input_layernorm, layer.post_attention_layernorm
        return cls(norms[0], qkv, out, norms[1], gate, up, down, own.scaling)


class StaticDecoder:
    """Prefill once, then step token by token, for one batch of B sequences, with the weights of the moment it is made.

    Prompts of different lengths are padded on the left; padding is masked and positions count from each prompt's first
    real token, so a sequence's result does not depend on its padding.

    Args:
        rows: B.
        length: positions of the cache, prompt and image.
        embed, end: `LlamaBackbone.embed_prompts` and ``prompt_end`` of a family that has its own.
    """

    def __init__(
        self,
        llama: LlamaModel,
        rows: int,
        length: int,
        embed: Callable[[Sequence[Branch]], Tensor] | None = None,
        end: int | None = None,
    ) -> None:
        config = llama.config
        self._llama, self._rows, self._length = llama, rows, length
        self._embed, self._end = embed or partial(embed_ids, llama.embed_tokens), end
        self._heads, self._kv_heads, self._head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            llama.layers[0].self_attn.head_dim,
        )
        self._layers = [_Layer.of(layer, rows) for layer in llama.layers]
        self._used = 0  # positions of the cache that are set

    def prefill(self, prompts: Sequence[Branch], embeds: Mapping[int, Tensor] = {}) -> Tensor:
        """Read B prompts, each different one once; the state of each sequence's last token, [B, hidden].

        ``embeds``: see `Decoder.prefill`; of such a prompt every sequence is another one.
        """
        # Index of each different prompt, in order of first appearance: its ids, or the number of its sequence.
        keys = [row if row in embeds else tuple(prompt) for row, prompt in enumerate(prompts)]
        different = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        read = [embeds[key] if isinstance(key, int) else key for key in different]  # embeddings, or ids
        device, count = self._llama.norm.weight.device, max(map(len, read))
        owners = torch.tensor([different[key] for key in keys], device=device)  # [B]
        padding = torch.tensor([count - len(prompt) for prompt in read], device=device)  # [N], on the left
        slots = torch.arange(self._length, device=device)
        real = slots >= padding[:, None]  # [N, length]
        found = self._embedded(read)  # one prompt after the other
        hidden = found.new_zeros(len(read), count, found.shape[-1])
        hidden[real[:, :count]] = found
        # Padding attends to itself: a softmax over nothing is NaN.
        causal = slots[:count, None] >= slots[:count]  # [count, count]
        own = torch.eye(count, dtype=torch.bool, device=device)
        mask = (causal & real[:, None, :count]) | own  # [N, count, count]
        # [N, length], 0 in the padding; with an end, all sequences have the same.
        positions = (slots - padding[:, None]).clamp(min=0) if self._end is None else slots + self._end - count
        positions = positions.expand(len(different), -1)
        cos, sin = self._llama.rotary_emb(hidden, positions)  # [N, length, D]
        first, second = sin.chunk(2, dim=-1)
        self._angles = cos, torch.cat((-first, second), dim=-1)  # see `_rotate`
        self._cache = self._new_cache(len(different), count)
        states = self._forward(hidden, mask[:, None])[:, -1]
        # From one cache a prompt to one a sequence, long enough for the image.
        caches, self._cache = self._cache, self._new_cache(self._rows, self._length)
        for of_rows, of_prompts in zip(self._cache, caches, strict=True):
            of_rows[:, :, :, :count] = of_prompts[:, owners]  # layer by layer, to save memory
        padded = bool(padding.any())  # else all rows have the same positions, and nothing to mask
        self._angles = (cos[owners], self._angles[1][owners]) if padded else (cos[:1], self._angles[1][:1])
        self._mask = real[owners][:, None, None] if padded else None
        return states[owners]

    def _embedded(self, prompts: Sequence[Branch | Tensor]) -> Tensor:
        """Prompts by ids or by embeddings, one after the other: [all their entries, hidden]."""
        plain = [prompt for prompt in prompts if not isinstance(prompt, Tensor)]
        rows = iter(self._embed(plain).split([len(prompt) for prompt in plain]) if plain else ())
        parts = [prompt if isinstance(prompt, Tensor) else next(rows) for prompt in prompts]
        return torch.cat([part.to(self._llama.norm.weight.dtype) for part in parts])

    def _new_cache(self, rows: int, length: int) -> Tensor:
        """Unset keys and values of every layer, [layers, 2, rows, kv heads, length, D]."""
        weight = self._llama.norm.weight
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
        cos, sin = (angle[:, start : self._used, None] for angle in self._angles)  # alike for all heads
        summed = self._summed_rows() if start > 0 and hidden.device.type == "cpu" else None  # a step, no prefill
        for layer, (keys, values) in zip(self._layers, self._cache, strict=True):
            products = layer.qkv(_rms_norm(layer.input_norm, hidden)).unflatten(-1, (-1, self._head_dim))
            # Queries, then keys, then values: [rows, positions, heads, D].
            rotated = _rotate(products[:, :, : self._heads + self._kv_heads], cos, sin).transpose(1, 2)
            keys[:, :, start : self._used] = rotated[:, self._heads :]
            values[:, :, start : self._used] = products[:, :, self._heads + self._kv_heads :].transpose(1, 2)
            query = rotated[:, : self._heads].to(keys.dtype)  # float32 on a CPU
            mixed = self._attend(query, keys, values, mask, layer.scale, summed).to(hidden.dtype)
            hidden = layer.out.plus(mixed, hidden)
            normed = _rms_norm(layer.mlp_norm, hidden)
            hidden = layer.down.plus(layer.up.times(normed, layer.gate.silu(normed)), hidden)
        return _rms_norm(self._llama.norm, hidden)

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        scale: float,
        summed: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Attention of query [B, heads, L, D] over the used part of a layer's cache -> [B, L, heads * D]."""
        rows, heads, length, dim = query.shape
        read = keys[:, :, : self._used], values[:, :, : self._used]  # [B, kv heads, S, D] each
        if length > 1:
            grouped = heads != self._kv_heads
            mixed = F.scaled_dot_product_attention(query, *read, attn_mask=mask, scale=scale, enable_gqa=grouped)
            return mixed.transpose(1, 2).flatten(2)
        # One query a row: fused kernels are built for many; here products of our own are faster. Query heads that
        # share a key head stand in as that head's queries.
        query = query.reshape(rows, self._kv_heads, -1, dim)  # [B, kv heads, queries a key head, D]
        scores = torch.matmul(query * scale, read[0].transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(dim=-1)
        if summed is None:
            mixed = torch.matmul(weights, read[1])
        else:
            mixed = torch.embedding_bag(values.view(-1, dim), *summed, False, 0, False, weights.flatten())[0]
        return mixed.reshape(rows, 1, -1)

    def _summed_rows(self) -> tuple[Tensor, Tensor]:
        """The values that each query head reads at this step, as rows of a layer's values, and where each head begins.

        On a CPU a batched product costs as much for one query as for several; a weighted sum of table rows, which is
        what ``embedding_bag`` computes, only streams them.
        """
        heads = torch.arange(self._rows * self._kv_heads).repeat_interleave(self._heads // self._kv_heads)
        which = heads[:, None] * self._length + torch.arange(self._used)  # [B * heads, S]
        return which.flatten(), torch.arange(0, which.numel(), self._used)


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], module.weight, module.variance_epsilon)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves rotated against each other as Llama's checkpoints expect.

    The first half of ``sin`` has its sign turned, so that the halves need only be swapped.
    """
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, dims=-1), sin)
