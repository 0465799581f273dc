"""Janus image generation as a vLLM model: vLLM's Llama (paged attention) between Janus' image embedding and head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix


class JanusForImageGeneration(nn.Module):
    """Prompt and image ids in, logits over the V image tokens out (see `export` for the vocabulary)."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "lm_head.": None,
            "model.vision_model.": None,
            "model.aligner.": None,
            "model.vqmodel.": None,
            "model.": "",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        vq_config = JanusVQVAEConfig(**config.janus["vq_config"])
        self.config = config
        self.codes: int = vq_config.num_embeddings
        self.language_model = LlamaModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model"))
        self.language_model.embed_tokens = VocabParallelEmbedding(config.janus["text_vocab_size"], config.hidden_size)
        self.generation_embeddings = nn.Embedding(vq_config.num_embeddings, vq_config.embed_dim)
        self.generation_aligner = JanusVQVAEAlignerMLP(vq_config)
        # Logits rounded to bfloat16 would be the largest part of the difference to the learner's log-probabilities.
        self.generation_head = JanusVQVAEHead(vq_config).float()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Ids [N] -> embeddings [N, hidden]: below V an image token, from V on a text token."""
        image = self.generation_aligner(self.generation_embeddings(input_ids.clamp(max=self.codes - 1)))
        text = self.language_model.embed_tokens((input_ids - self.codes).clamp(min=0))
        return torch.where((input_ids < self.codes).unsqueeze(-1), image, text)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids and positions [N] of all running requests -> states [N, hidden]."""
        embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.language_model(None, positions, intermediate_tensors, embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """States [R, hidden] -> logits [R, V], float32."""
        return self.generation_head(hidden_states.float())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors by their names in a Janus checkpoint; what images do not need is skipped."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
