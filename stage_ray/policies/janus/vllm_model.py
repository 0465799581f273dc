"""Janus image generation as a vLLM model: vLLM's Llama (paged attention) between Janus' image embedding and head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from stage_ray.policies.vllm_llama import LlamaImageModel


class ImageFirstEmbedding(nn.Module):
    """Ids of the image-first vocabulary to embeddings: below V an image token, from V on a text token."""

    def __init__(self, vq_config: JanusVQVAEConfig, texts: int, width: int) -> None:
        super().__init__()
        self.codes: int = vq_config.num_embeddings
        self.text = VocabParallelEmbedding(texts, width)
        self.image = nn.Embedding(vq_config.num_embeddings, vq_config.embed_dim)
        self.aligner = JanusVQVAEAlignerMLP(vq_config)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [N] -> embeddings [N, width]."""
        image = self.aligner(self.image(ids.clamp(max=self.codes - 1)))  # of text ids too, and not used
        text = self.text((ids - self.codes).clamp(min=0))
        return torch.where((ids < self.codes).unsqueeze(-1), image, text)  # no branch: CUDA graphs take none


class FusedNorm(RMSNorm):
    """vLLM's norm by the kernel that it has for CPUs; by itself it runs six operators of torch there."""

    def forward_cpu(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """States [N, hidden] -> normed; with a residual, in place: their sum, normed, and the sum itself."""
        if residual is None:
            normed = torch.empty_like(x)
            torch.ops._C.rms_norm(normed, x, self.weight, self.variance_epsilon)
            return normed
        torch.ops._C.fused_add_rms_norm(x, residual, self.weight, self.variance_epsilon)
        return x, residual


class JanusForImageGeneration(LlamaImageModel):
    """Prompt and image ids in (`JanusCodec.vllm_spec` numbers them), logits over the V image tokens out.

    Ids are embedded inside of `LlamaModel`, which vLLM compiles and on a GPU cuts into CUDA graphs. A graph reads its
    inputs where they lay when it was captured. vLLM keeps ids and positions there, but embeddings made outside would
    lie elsewhere in every step, and a prompt's graph (``FULL_AND_PIECEWISE``, the default) would read old ones.
    """

    llama = "language_model"
    mapper = hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "lm_head.": None,
            "model.vision_model.": None,
            "model.aligner.": None,
            "model.vqmodel.": None,
            "model.language_model.embed_tokens.": "language_model.embed_tokens.text.",
            "model.generation_embeddings.": "language_model.embed_tokens.image.",
            "model.generation_aligner.": "language_model.embed_tokens.aligner.",
            "model.": "",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config  # of `JanusCodec.vllm_spec`
        vq_config = JanusVQVAEConfig(**config.janus["vq_config"])
        self.config = config
        self.language_model = LlamaModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model"))
        self.language_model.embed_tokens = ImageFirstEmbedding(
            vq_config, config.janus["text_vocab_size"], config.hidden_size
        )
        self.generation_head = JanusVQVAEHead(vq_config)
        if vllm_config.device_config.device_type == "cpu":
            for name, module in list(self.language_model.named_modules()):
                if isinstance(module, RMSNorm):
                    self.language_model.set_submodule(name, FusedNorm(config.hidden_size, config.rms_norm_eps))
        for name in ("proj_out", "vision_head"):
            self.generation_head.set_submodule(name, _float32_linear(self.generation_head.get_submodule(name), name))

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """States [R, hidden] -> logits [R, V], float32."""
        return self.generation_head(hidden_states.float())


def _float32_linear(layer: nn.Module, name: str) -> ReplicatedLinear:
    """vLLM's layer of the same shape: on a CPU it packs weights once, where torch's packs them in every step.

    Logits rounded to bfloat16 would be the largest part of the difference to the learner's log-probabilities.
    """
    assert isinstance(layer, nn.Linear)
    sizes = layer.in_features, layer.out_features
    return ReplicatedLinear(*sizes, params_dtype=torch.float32, return_bias=False, prefix=f"generation_head.{name}")
