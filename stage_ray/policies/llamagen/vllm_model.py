"""LlamaGen as a vLLM model: vLLM's Llama (paged attention), with its own rotary positions, embeddings and head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from stage_ray.policies.llamagen.model import CaptionProjection
from stage_ray.policies.llamagen.rotary import angles
from stage_ray.policies.vllm_llama import LlamaImageModel


class GridRotation(nn.Module):
    """Turns queries and keys by the row and column of their image token; those of a prompt become zero."""

    cos: Tensor
    sin: Tensor

    def __init__(self, said: dict[str, Any], width: int) -> None:
        super().__init__()
        self._width = width
        positions = torch.arange(said["prompt_tokens"] + said["side"] ** 2)
        tables = angles(positions, said["prompt_tokens"], said["side"], width, said["rope_theta"])
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [N]; queries and keys [N, heads * D], as many heads as this rank has."""
        cos, sin = (table[positions].unsqueeze(-2).to(query.dtype) for table in (self.cos, self.sin))  # [N, 1, D / 2]
        turned = []
        for states in (query, key):
            first, second = states.unflatten(-1, (-1, self._width)).chunk(2, dim=-1)
            whole = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
            turned.append(whole.flatten(-2))
        return turned[0], turned[1]


class GridAttention(LlamaAttention):
    """A Llama's attention with `GridRotation`."""

    def _init_rotary_emb(self, config: Any, quant_config: Any) -> None:
        self.rotary_emb = GridRotation(config.llamagen, self.head_dim)


class GridLayer(LlamaDecoderLayer):
    """A Llama's layer with `GridAttention`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=GridAttention)


class FeatureRows(nn.Module):
    """What the rows of a batch's captions are, where vLLM's graphs find it: filled before the batch."""

    rows: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(rows, width), persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        """Numbers [N] -> features [N, width]; numbers beyond the last are taken for the last."""
        return self.rows[numbers.clamp(max=len(self.rows) - 1)]


class ImageFirstEmbedding(nn.Module):
    """Ids below V are image tokens; from V on they are classes, or rows of captions' features."""

    def __init__(self, said: dict[str, Any], rows: int, width: int) -> None:
        super().__init__()
        self.codes: int = said["codes"]
        self.image = nn.Embedding(self.codes, width)
        features = said["caption_width"]
        self.features = FeatureRows(rows, features) if features else None
        self.prompt = CaptionProjection(features, width) if features else nn.Embedding(said["classes"], width)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [N] -> embeddings [N, width]."""
        image = self.image(ids.clamp(max=self.codes - 1))  # of prompts' ids too, and not used
        others = (ids - self.codes).clamp(min=0)
        prompt = self.prompt(others) if self.features is None else self.prompt(self.features(others))
        return torch.where((ids < self.codes).unsqueeze(-1), image, prompt)  # no branch: CUDA graphs take none


class LlamaGenForImageGeneration(LlamaImageModel):
    """Prompt and image ids in (`LlamaGenCodec.vllm_spec` numbers them), logits over the V image tokens out.

    Ids are embedded inside of `LlamaModel`, as in `stage_ray.policies.janus.vllm_model`, where it says why.
    """

    supports_mrope = True  # used where captions are: see `get_mrope_input_positions`
    llama = "transformer"
    mapper = WeightsMapper(
        orig_to_new_prefix={
            "vq.": None,
            "unconditional": None,
            "gpt.transformer.embed_tokens.": "transformer.embed_tokens.prompt.",
            "gpt.image_embedding.": "transformer.embed_tokens.image.",
            "gpt.": "",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config  # of `LlamaGenCodec.vllm_spec`
        self.config, said = config, config.llamagen
        self._prompt_tokens: int = said["prompt_tokens"]
        name = maybe_prefix(prefix, "transformer")
        self.transformer = LlamaModel(vllm_config=vllm_config, prefix=name, layer_type=GridLayer)
        rows = vllm_config.scheduler_config.max_num_batched_tokens  # a whole batch's prompts
        self.transformer.embed_tokens = ImageFirstEmbedding(said, rows, config.hidden_size)
        sizes = config.hidden_size, said["codes"]
        # In float32, and vLLM's own class: see `stage_ray.policies.janus.vllm_model`.
        self.head = ReplicatedLinear(*sizes, bias=False, params_dtype=torch.float32, return_bias=False, prefix="head")

    @property
    def prompt_features(self) -> Tensor:
        """The table that the engine fills before each batch."""
        return self.transformer.embed_tokens.features.rows

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any = None) -> tuple[Tensor, int]:
        """Positions [3, n] of a prompt that ends where the longest would, and how much further its image is too."""
        moved = self._prompt_tokens - len(input_tokens)
        return (torch.arange(len(input_tokens)) + moved).expand(3, -1), moved

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids [N] and positions [N], or three equal rows of them, of all running requests -> states [N, hidden]."""
        places = positions[0] if positions.dim() == 2 else positions
        return super().forward(input_ids, places, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """States [R, hidden] -> logits [R, V], float32."""
        return self.head(hidden_states.float())
