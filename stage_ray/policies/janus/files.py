"""The parts of Janus that engines need without the language model: prompts to ids, tokens to pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoProcessor, GenerationConfig, JanusConfig, JanusProcessor, JanusVQVAE

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies.base import PromptIds
from stage_ray.policies.checkpoint_files import local_checkpoint, read_tensors

PAPER_ROLES = {"<|User|>": "User", "<|Assistant|>": "Assistant"}
VQ_PREFIX = "model.vqmodel."
DECODE_CHUNK = 16  # images decoded at once: bounds the memory of full-size feature maps


@dataclass(frozen=True)
class JanusFiles:
    """What a checkpoint holds beside its weights.

    Example:
        files = JanusFiles.load(PolicyConfig(path="deepseek-community/Janus-Pro-1B"))
    """

    location: Path
    config: JanusConfig
    generation: GenerationConfig
    processor: JanusProcessor

    @classmethod
    def load(cls, policy: PolicyConfig) -> JanusFiles:
        """Read configs, tokenizer and template.

        Raises:
            ConfigError: the checkpoint is missing, incomplete, or not Janus.
        """
        location = local_checkpoint(policy.path, "janus")
        try:
            config = JanusConfig.from_pretrained(location)
            generation = GenerationConfig.from_pretrained(location)
            processor = AutoProcessor.from_pretrained(location, trust_remote_code=policy.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ConfigError(f"policy.path: {location} does not load as a Janus model: {error}") from error
        if not isinstance(config, JanusConfig) or not isinstance(processor, JanusProcessor):
            raise ConfigError(f"policy.path: {location} is not a Janus model with its processor")
        return cls(location, config, generation, processor)

    @property
    def image_tokens(self) -> int:
        """T, tokens of one image."""
        return int(self.config.vq_config.num_patches) ** 2

    @property
    def codebook_size(self) -> int:
        """V, entries of the image codebook."""
        return int(self.config.vq_config.num_embeddings)


class JanusPrompts:
    """Prompt text to token ids, as transformers' processor and ``generate`` make them."""

    def __init__(self, files: JanusFiles, template: Literal["official", "paper"]) -> None:
        self._processor = files.processor
        chat_template: Any = files.processor.chat_template
        if not isinstance(chat_template, str):
            raise ConfigError(f"policy.path: {files.location} has no chat template (chat_template.jinja)")
        if template == "paper":
            for official, paper in PAPER_ROLES.items():
                chat_template = chat_template.replace(official, paper)
        self._chat_template = chat_template
        tokenizer = files.processor.tokenizer
        self._boi = int(tokenizer.convert_tokens_to_ids(tokenizer.boi_token))
        self._kept = {tokenizer.bos_token_id, self._boi}
        self._pad = int(tokenizer.pad_token_id)
        self._encode = lru_cache(maxsize=4096)(self._encode_uncached)  # one prompt is asked for many times

    def encode(self, text: str) -> PromptIds:
        """Both branches of a prompt: the chat with the image to begin, and the same with all but bos and boi blanked.

        The unconditional branch replaces every other token by pad and attends to it, as ``generate`` of transformers
        does (and the paper's code, arXiv 2509.25027).
        """
        return self._encode(text)

    def _encode_uncached(self, text: str) -> PromptIds:
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        template = self._chat_template
        chat = self._processor.apply_chat_template(messages, add_generation_prompt=True, chat_template=template)
        encoded = self._processor(text=[chat], generation_mode="image")
        conditional = tuple(int(token) for token in encoded["input_ids"][0])
        unconditional = tuple(token if token in self._kept else self._pad for token in conditional)
        return PromptIds(conditional, unconditional)


def load_vqmodel(files: JanusFiles, device: torch.device) -> JanusVQVAE:
    """The image tokenizer alone, frozen, in float32.

    Raises:
        ConfigError: the checkpoint lacks some of its tensors.
    """
    vqmodel = JanusVQVAE(files.config.vq_config)
    missing, _ = vqmodel.load_state_dict(read_tensors(files.location, VQ_PREFIX), strict=False)
    if missing:
        raise ConfigError(
            f"policy.path: {files.location} lacks {len(missing)} tensors, the first is {VQ_PREFIX}{missing[0]}"
        )
    return vqmodel.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def codebook(vqmodel: JanusVQVAE) -> Tensor:
    """Codebook vectors as the decoder gets them, float32 [V, D]: ``get_codebook_entry`` scales each to unit length."""
    return F.normalize(vqmodel.quantize.embedding.weight.detach().float(), p=2, dim=-1)


@torch.no_grad()
def decode(vqmodel: JanusVQVAE, tokens: Tensor) -> Tensor:
    """Tokens int64 [B, T] -> images uint8 [B, H, W, 3] on the CPU; the decoder speaks -1..1."""
    device = vqmodel.quantize.embedding.weight.device
    chunks = [vqmodel.decode(chunk.to(device)) for chunk in tokens.split(DECODE_CHUNK)]
    pixels = torch.cat([((chunk.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).cpu() for chunk in chunks])
    return pixels.permute(0, 2, 3, 1).contiguous()
