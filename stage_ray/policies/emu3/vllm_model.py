"""Emu3 as a vLLM model: vLLM's Llama (paged attention) over one table of embeddings, and the head's image rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from stage_ray.policies.vllm_llama import LlamaImageModel


class ImageFirstEmbedding(nn.Module):
    """Ids of the image-first vocabulary to embeddings: below V an image token, from V on an id of the checkpoint."""

    def __init__(self, said: dict[str, Any], width: int) -> None:
        super().__init__()
        self._codes: int = said["codes"]
        self._first: int = said["first"]
        self.table = VocabParallelEmbedding(said["vocabulary"], width)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [N] -> embeddings [N, width]."""
        return self.table(torch.where(ids < self._codes, ids + self._first, ids - self._codes))


class Emu3ForImageGeneration(LlamaImageModel):
    """Prompt and image ids in (`Emu3Codec.vllm_spec` numbers them), logits over the V image tokens out.

    Ids are embedded inside of `LlamaModel`, as in `stage_ray.policies.janus.vllm_model`, where it says why.
    """

    llama = "text_model"
    mapper = WeightsMapper(
        orig_to_new_prefix={
            "vqmodel.": None,
            "text_model.model.embed_tokens.": "text_model.embed_tokens.table.",
            "text_model.model.": "text_model.",
            "text_model.lm_head.": "lm_head.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config  # of `Emu3Codec.vllm_spec`
        self.config = config
        self._image_rows = slice(config.emu3["first"], config.emu3["first"] + config.emu3["codes"])
        self.text_model = LlamaModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "text_model"))
        self.text_model.embed_tokens = ImageFirstEmbedding(config.emu3, config.hidden_size)
        sizes = config.hidden_size, config.emu3["codes"]
        # In float32, and vLLM's own class: see `stage_ray.policies.janus.vllm_model`.
        self.lm_head = ReplicatedLinear(
            *sizes, bias=False, params_dtype=torch.float32, return_bias=False, prefix="lm_head"
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """States [R, hidden] -> logits [R, V], float32."""
        return self.lm_head(hidden_states.float())

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """Of the head the rows of image tokens."""
        return tensor[self._image_rows] if name == "text_model.lm_head.weight" else tensor
