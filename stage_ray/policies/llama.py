"""A Llama forward for training, over the modules of transformers: each different prompt once, and nothing padded.

It computes what ``LlamaModel`` computes. Prompts and images lie one after the other in one matrix of N positions; only
attention sees them as sequences. For the backward pass a layer keeps its two inputs, queries, keys, values and the two
wide states of its MLP; norms and their product are made again, which costs less than reading them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from stage_ray.policies.backbone import Backbone, embed_ids
from stage_ray.policies.codec import Branch
from stage_ray.policies.lora import base_linear, low_rank

if TYPE_CHECKING:
    from transformers import LlamaModel


class LlamaBackbone(Backbone):
    """A backbone whose language model is transformers' ``LlamaModel``, which itself works as before.

    Its layers are called one by one, as modules, so that FSDP's hooks and transformers' checkpointing hold for them.
    """

    language_model: LlamaModel
    prompt_end: int | None = None  # position after every prompt's last; None: each prompt's first is 0

    def __init__(self, language_model: LlamaModel) -> None:
        super().__init__(language_model)
        for layer in language_model.layers:
            layer.__class__ = PackedLayer  # the same modules and parameters, another forward

    def predict(self, prompts: Sequence[Sequence[int]], image_embeds: Tensor) -> Tensor:
        """As `Backbone.predict`; a prompt that several images share is computed once, forward and backward."""
        return self(Packing(prompts, image_embeds.shape[1], image_embeds.device, self.prompt_end), image_embeds)

    def embed_prompts(self, prompts: Sequence[Branch]) -> Tensor:
        """Different prompts, one after the other, to the layers' inputs, [all their entries, hidden]."""
        return embed_ids(self.language_model.embed_tokens, prompts)

    def prompt_states(self, embeds: Tensor) -> Tensor:
        """Last hidden states of n prompts of one length, by transformers' own forward: [n, L, hidden], the same."""
        end = embeds.shape[1] if self.prompt_end is None else self.prompt_end
        positions = torch.arange(end - embeds.shape[1], end, device=embeds.device)
        found = self.language_model(inputs_embeds=embeds, position_ids=positions[None], use_cache=False)
        return found.last_hidden_state

    def checkpoint_layers(self) -> None:
        """Recompute each layer in the backward pass, as transformers does; dropout stays off."""
        self.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in self.language_model.layers:
            layer.training = True  # what the layer itself looks at; the modules inside it stay in eval mode

    def forward(self, packing: Packing, image_embeds: Tensor) -> Tensor:  # type: ignore[override]
        """Embeddings [B, T - 1, hidden] after their prompts -> states [B, T, hidden]."""
        llama, width = self.language_model, image_embeds.shape[-1]
        embeds = self.embed_prompts(packing.prompts)
        hidden = torch.cat([embeds, image_embeds.to(embeds.dtype).flatten(0, 1)])  # [N, hidden]
        packing.angles = tuple(angle[0] for angle in llama.rotary_emb(hidden, packing.positions[None]))
        for layer in llama.layers:
            hidden = layer(hidden, packing)
        # The state at a prompt's last token predicts the first image token.
        last, rest = hidden[packing.last][packing.owners], hidden[len(embeds) :]
        states = torch.cat([last.unsqueeze(1), rest.view(len(packing.owners), -1, width)], dim=1)
        return F.rms_norm(states, (width,), llama.norm.weight, llama.norm.variance_epsilon)


class Packing:
    """Where B prompts and images of n tokens lie: different prompts one after the other, then every image.

    Not a dataclass: FSDP would look into it for tensors to cast.

    Attributes:
        prompts: the different prompts.
        positions: int64 [N], within each sequence; with ``end`` so that every prompt ends before it.
        owners, last: int64 [B], the prompt of each image; int64 [prompts], the place of each prompt's last token.
        rows: int64 [B * L], the place of each position of the B sequences, 0 for padding at their end.
        select: int64 [N], where in B * L a place is found again; of a shared prompt, in its first sequence.
        repeated: of every further sequence of a prompt: its number, and the prompt's first place and length.
        angles: cosines and sines [N, D] of the positions.
    """

    angles: tuple[Tensor, ...]

    def __init__(
        self, prompts: Sequence[Sequence[int]], images: int, device: torch.device, end: int | None = None
    ) -> None:
        different = {prompt: index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        owners = [different[tuple(prompt)] for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in different])
        ends = lengths.cumsum(0)
        packed, longest = int(ends[-1]), int(lengths.max())
        self.length = longest + images  # L
        rows = torch.zeros(len(prompts), self.length, dtype=torch.int64)
        select = torch.empty(packed + len(prompts) * images, dtype=torch.int64)
        positions = torch.empty_like(select)
        self.repeated, seen = list[tuple[int, int, int]](), set[int]()
        for row, owner in enumerate(owners):
            length = int(lengths[owner])
            start, image = int(ends[owner]) - length, packed + row * images
            rows[row, :length] = torch.arange(start, start + length)
            rows[row, length : length + images] = torch.arange(image, image + images)
            places = torch.arange(length + images)
            positions[rows[row, : length + images]] = places if end is None else places + end - length
            if owner in seen:
                self.repeated.append((row, start, length))
                select[rows[row, length : length + images]] = row * self.length + places[length:]
            else:
                select[rows[row, : length + images]] = row * self.length + places
            seen.add(owner)
        self.prompts = list(different)
        self.owners, self.last = torch.tensor(owners, device=device), (ends - 1).to(device)
        self.positions, self.rows, self.select = (each.to(device) for each in (positions, rows.flatten(), select))

    def spread(self, states: Tensor, heads: int) -> Tensor:
        """Packed states [N, heads * D] as sequences [B, heads, L, D]; padding is a copy of some state."""
        return _Spread.apply(states, self).view(len(self.owners), self.length, heads, -1).transpose(1, 2)


class PackedLayer(LlamaDecoderLayer):
    """A layer that also takes packed positions [N, hidden], beside the batches that transformers gives it."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *rest: Any, **named: Any) -> Tensor:
        """transformers' own forward, or with a `Packing` in place of a mask ours."""
        if not isinstance(attention_mask, Packing):
            return super().forward(hidden_states, attention_mask, *rest, **named)
        packing, attention, mlp = attention_mask, self.self_attn, self.mlp
        query, key, value = _normed(
            self.input_layernorm, hidden_states, attention.q_proj, attention.k_proj, attention.v_proj
        )
        size = attention.head_dim
        query, key = (_Rotate.apply(states.unflatten(-1, (-1, size)), *packing.angles) for states in (query, key))
        mixed = attend(packing, query.flatten(1), key.flatten(1), value, size, attention.scaling)
        hidden = hidden_states + attention.o_proj(mixed)
        gate, up = _normed(self.post_attention_layernorm, hidden, mlp.gate_proj, mlp.up_proj)
        (down,) = _adapted(_GatedDown.apply(gate, up, *_matrices(mlp.down_proj)), mlp.down_proj)
        return hidden + down


def attend(packing: Packing, query: Tensor, key: Tensor, value: Tensor, size: int, scale: float) -> Tensor:
    """Causal attention of packed states [N, heads or kv heads * size] -> [N, heads * size]."""
    heads, kv_heads = query.shape[1] // size, key.shape[1] // size
    sequences = [packing.spread(*each) for each in ((query, heads), (key, kv_heads), (value, kv_heads))]
    attention: Any = partial(F.scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=heads != kv_heads)
    if query.device.type == "cpu" and query.dtype != torch.float32:
        # A CPU multiplies small bfloat16 matrices slower than float32 ones; its fused kernel is the fastest in float32.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), torch.autocast("cpu", enabled=False):
            mixed = attention(*(each.float() for each in sequences)).to(query.dtype)
    else:
        mixed = attention(*sequences)
    return _Collect.apply(mixed.transpose(1, 2).flatten(2).flatten(0, 1), packing)


def _normed(norm: Any, hidden: Tensor, *linears: nn.Module) -> list[Tensor]:
    """Each linear map of ``norm(hidden)``, in the dtype of autocast if it is on."""
    device, matrices = hidden.device.type, _matrices(*linears)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrices[0].dtype
    return _adapted(_NormedProducts.apply(hidden, norm.weight, norm.variance_epsilon, dtype, *matrices), *linears)


def _matrices(*linears: nn.Module) -> list[Tensor]:
    """All that reads the input of some linear maps: their matrices, then the first ones of their adapters."""
    adapters = [adapter for one in linears if (adapter := low_rank(one)) is not None]
    return [base_linear(one).weight for one in linears] + [adapter.down.weight for adapter in adapters]


def _adapted(products: Sequence[Tensor], *linears: nn.Module) -> list[Tensor]:
    """Each linear map's result from the products of `_matrices`: bias and adapter added."""
    narrow, results = iter(products[len(linears) :]), []
    for product, one in zip(products, linears, strict=False):  # behind those of the maps stand the adapters'
        bias = base_linear(one).bias
        result = product if bias is None else product + bias.to(product.dtype)
        if (adapter := low_rank(one)) is not None:
            up = adapter.up.weight.to(product.dtype)
            result = torch.addmm(result, next(narrow), up.T, alpha=adapter.scale)
        results.append(result)
    return results


class _NormedProducts(torch.autograd.Function):
    """RMS norm, then products with several matrices; keeps the input and one factor a row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        wide = hidden.float()
        factor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        factor = factor.div_(hidden.shape[-1]).add_(epsilon).rsqrt_()  # [N, 1]
        normed = (wide * factor).mul_(weight).to(dtype)
        ctx.save_for_backward(hidden, factor, weight, *matrices)
        ctx.dtype = dtype
        with torch.autocast(hidden.device.type, enabled=False):
            return tuple(normed @ matrix.to(dtype).T for matrix in matrices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, factor, weight, *matrices = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            scaled = hidden.float() * factor  # before the norm's weight
            normed = (scaled * weight).to(ctx.dtype)
            of_normed = gradients[0] @ matrices[0].to(ctx.dtype)
            for gradient, matrix in zip(gradients[1:], matrices[1:], strict=True):
                of_normed = torch.addmm(of_normed, gradient, matrix.to(ctx.dtype))
            of_matrices = [
                (gradient.T @ normed).to(matrix.dtype) if wanted else None
                for gradient, matrix, wanted in zip(gradients, matrices, ctx.needs_input_grad[4:], strict=True)
            ]
            slope = of_normed.float()
            of_weight = (slope * scaled).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
            slope = slope * weight
            slope.addcmul_(scaled, (slope * scaled).mean(-1, keepdim=True), value=-1).mul_(factor)
        return slope.to(hidden.dtype), of_weight, None, None, *of_matrices


class _GatedDown(torch.autograd.Function):
    """``(silu(gate) * up) @ matrix.T`` for several matrices, which keeps gate and up and makes their product again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(gate, up, *matrices)
        with torch.autocast(gate.device.type, enabled=False):
            gated = F.silu(gate).mul_(up)
            return tuple(gated @ matrix.to(gate.dtype).T for matrix in matrices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, *matrices = ctx.saved_tensors
        with torch.autocast(gate.device.type, enabled=False):
            gradients = tuple(gradient.to(gate.dtype) for gradient in gradients)
            gated = F.silu(gate)
            product = gated * up if any(ctx.needs_input_grad[2:]) else gated
            of_matrices = [
                (gradient.T @ product).to(matrix.dtype) if wanted else None
                for gradient, matrix, wanted in zip(gradients, matrices, ctx.needs_input_grad[2:], strict=True)
            ]
            del product
            of_product = gradients[0] @ matrices[0].to(gate.dtype)
            for gradient, matrix in zip(gradients[1:], matrices[1:], strict=True):
                of_product = torch.addmm(of_product, gradient, matrix.to(gate.dtype))
            of_up = gated.mul_(of_product)
            of_gate = torch.ops.aten.silu_backward(of_product.mul_(up), gate)
        return of_gate, of_up, *of_matrices


class _Rotate(torch.autograd.Function):
    """Rotary embedding of [N, heads, D], halves rotated against each other as Llama's checkpoints expect."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.angles = cos, sin
        return _rotate(states, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.angles
        return _rotate(gradient, cos, -sin), None, None  # a rotation's transpose is the rotation back


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    cos, sin = (angle[:, None, :half].to(states.dtype) for angle in (cos, sin))  # both halves are alike
    first, second = states[..., :half], states[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Spread(torch.autograd.Function):
    """Packed states to sequences; a shared prompt's gradient is the sum over its sequences."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return states.index_select(0, packing.rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packing: Packing = ctx.packing
        found = gradient.index_select(0, packing.select)
        for row, start, length in packing.repeated:
            found[start : start + length] += gradient[row * packing.length :][:length]
        return found, None


class _Collect(torch.autograd.Function):
    """Sequences to packed states: of a shared prompt, those of its first sequence."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return states.index_select(0, packing.select)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packing: Packing = ctx.packing
        found = gradient.new_zeros(len(packing.rows), gradient.shape[1])
        found[packing.select] = gradient
        return found, None
