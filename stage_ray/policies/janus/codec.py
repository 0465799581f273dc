"""Janus without its language model: prompts, the VQ image tokenizer, and the config that vLLM reads.

transformers' Janus classes take seconds to import, so that waits until a checkpoint is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies.base import ImageCodec, PromptIds, VllmSpec
from stage_ray.policies.checkpoint_files import local_checkpoint, read_tensors
from stage_ray.policies.janus.prompts import JanusPrompts

if TYPE_CHECKING:
    from transformers import JanusConfig, JanusProcessor, JanusVQVAE

MODEL_TYPE = "janus"
TRAINED_PREFIX, VQ_PREFIX = "model.language_model.", "model.vqmodel."
DECODE_CHUNK = 16  # images decoded at once: bounds the memory of full-size feature maps
# What vLLM's flat config must not inherit from the text config: names, dtypes and tokens that mean something else here.
LEFT_OUT = ("architectures", "model_type", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path")


class JanusCodec(ImageCodec):
    """What a Janus checkpoint holds beside its language model.

    Attributes:
        config, processor: transformers' own.
        vqmodel: the image tokenizer; None where nothing is decoded here.

    Example:
        codec = JanusCodec.load(PolicyConfig(path="deepseek-community/Janus-Pro-1B"))
        codec.load_decoder(torch.device("cpu"))
    """

    vqmodel: JanusVQVAE | None = None

    def __init__(self, location: Path, config: JanusConfig, processor: JanusProcessor, prompts: JanusPrompts) -> None:
        self.location, self.config, self.processor, self._prompts = location, config, processor, prompts
        side = int(config.vq_config.num_patches)
        self.grid = (side, side)
        self.codebook_size = int(config.vq_config.num_embeddings)

    @classmethod
    def load(cls, policy: PolicyConfig) -> JanusCodec:
        """Read configs, tokenizer and template, and no weights.

        Raises:
            ConfigError: the checkpoint is missing, incomplete, or not Janus.
        """
        from transformers import AutoProcessor, JanusConfig, JanusProcessor

        location = local_checkpoint(policy.path, MODEL_TYPE)
        try:
            config = JanusConfig.from_pretrained(location)
            processor = AutoProcessor.from_pretrained(location, trust_remote_code=policy.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ConfigError(f"policy.path: {location} does not load as a Janus model: {error}") from error
        if not isinstance(config, JanusConfig) or not isinstance(processor, JanusProcessor):
            raise ConfigError(f"policy.path: {location} is not a Janus model with its processor")
        return cls(location, config, processor, JanusPrompts(processor, policy.template))

    def load_decoder(self, device: torch.device) -> None:
        """Load the image tokenizer alone, frozen, in float32.

        Raises:
            ConfigError: the checkpoint lacks some of its tensors.
        """
        from transformers import JanusVQVAE

        vqmodel = JanusVQVAE(self.config.vq_config)
        tensors = read_tensors(self.location, (VQ_PREFIX,))
        missing, _ = vqmodel.load_state_dict(
            {name.removeprefix(VQ_PREFIX): tensor for name, tensor in tensors.items()}, strict=False
        )
        if missing:
            lacking = f"{len(missing)} tensors, the first is {VQ_PREFIX}{missing[0]}"
            raise ConfigError(f"policy.path: {self.location} lacks {lacking}")
        self.vqmodel = for_sampling(vqmodel.to(device).requires_grad_(False))

    def encode_prompt(self, text: str) -> PromptIds:
        """Both branches of a prompt, chat template applied, ending in the token that begins an image."""
        return self._prompts.encode(text)

    def codebook(self) -> Tensor:
        """Codebook vectors as the decoder gets them, float32 [V, D]: ``get_codebook_entry`` scales each to length 1."""
        return F.normalize(self._tokenizer().quantize.embedding.weight.detach().float(), p=2, dim=-1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] -> images uint8 [B, H, W, 3] on the CPU; the decoder speaks -1..1."""
        vqmodel = self._tokenizer()
        device = vqmodel.quantize.embedding.weight.device
        chunks = [vqmodel.decode(chunk.to(device)) for chunk in tokens.split(DECODE_CHUNK)]
        pixels = torch.cat([((chunk.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).cpu() for chunk in chunks])
        return pixels.permute(0, 2, 3, 1).contiguous()

    def vllm_spec(self) -> VllmSpec:
        """The language model's config at the top level, and under ``janus`` what the image modules need.

        **Image-first vocabulary**: ids 0..V-1 are image tokens and text ids are shifted by V. Logits are V wide, a
        sampled id is fed back as it is, and the embedding tells the two kinds apart by value.
        """
        text, vq = self.config.text_config, self.config.vq_config
        flat = {key: value for key, value in text.to_dict().items() if key not in LEFT_OUT}
        flat |= {
            "model_type": "llama",
            "vocab_size": self.codebook_size + text.vocab_size,
            "tie_word_embeddings": False,
            "janus": {"vq_config": vq.to_dict(), "text_vocab_size": text.vocab_size},
        }
        return VllmSpec(
            config=flat,
            prompt_shift=self.codebook_size,
            max_positions=text.max_position_embeddings,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            frozen=("model.generation_",),
        )

    def _tokenizer(self) -> JanusVQVAE:
        if self.vqmodel is None:
            raise RuntimeError("this process has no image decoder: its codec was loaded without one")
        return self.vqmodel


def for_sampling(vqmodel: JanusVQVAE) -> JanusVQVAE:
    """In float32 (pictures do not come from rounded weights), channels last: a CPU convolves faster so."""
    return vqmodel.to(dtype=torch.float32, memory_format=torch.channels_last).eval()
