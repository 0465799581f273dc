"""LlamaGen's transformer in training: a Llama whose prompts are classes or features, and end at one position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stage_ray.policies.codec import Branch
from stage_ray.policies.llama import LlamaBackbone
from stage_ray.policies.llamagen.codec import LlamaGenCodec
from stage_ray.policies.llamagen.model import LlamaGenModel


class LlamaGenBackbone(LlamaBackbone):
    """Prompts end where the longest would, so that the image's first token has the same position in all sequences."""

    def __init__(self, model: LlamaGenModel, codec: LlamaGenCodec) -> None:
        super().__init__(model.transformer)
        self.prompt_end = model.config.prompt_tokens
        self._codec = codec

    def embed_prompts(self, prompts: Sequence[Branch]) -> Tensor:
        """See `LlamaBackbone.embed_prompts`; a caption's features come from the codec, and carry no gradient."""
        if self._codec.config.condition == "class":
            return super().embed_prompts(prompts)
        device = self.language_model.norm.weight.device
        features = [self._codec.prompt_features(prompt).to(device) for prompt in prompts]
        return self.language_model.embed_tokens(torch.cat([part.float() for part in features]))
