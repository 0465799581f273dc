"""Pictures as the image tokenizer shows them: reconstructions, and pictures decoded from tokens that mean nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration, JanusVQVAE

BATCH_IMAGES = 64


class TokenizerView:
    """The VQ tokenizer of a Janus checkpoint, as a function from pictures to pictures. Runs on the CPU in float32."""

    def __init__(self, model: JanusVQVAE) -> None:
        """Look through this tokenizer; it is put into evaluation mode and computes in float32."""
        self._model = model.float().eval()

    @classmethod
    def load(cls, directory: Path) -> TokenizerView:
        """The tokenizer of a checkpoint directory that transformers wrote."""
        return cls(JanusForConditionalGeneration.from_pretrained(directory, local_files_only=True).model.vqmodel)

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> Tensor:
        """Images uint8 [B, 64, 64, 3] -> tokens int64 [B, T]."""
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(BATCH_IMAGES)
        return torch.cat([self._model.encode(b.float() / 127.5 - 1).image_tokens.view(len(b), -1) for b in batches])

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> np.ndarray:
        """Tokens int64 [B, T] -> images uint8 [B, 64, 64, 3]."""
        pixels = torch.cat([self._model.decode(batch) for batch in tokens.split(BATCH_IMAGES)])
        return ((pixels.permute(0, 2, 3, 1) + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8).numpy()

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [B, 64, 64, 3] -> what is left of them after encoding and decoding."""
        return self.decode(self.encode(images))

    def random_images(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Pictures uint8 [count, 64, 64, 3] decoded from tokens drawn uniformly and independently."""
        config = self._model.config
        shape = (count, config.num_patches**2)
        return self.decode(torch.from_numpy(rng.integers(config.num_embeddings, size=shape)))

    def shuffled_images(self, images: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
        """Pictures whose tokens were exchanged among a share of their places: right parts in wrong places."""
        tokens = self.encode(images).numpy().copy()
        for image in tokens:
            places = rng.permutation(len(image))[: int(share * len(image))]
            image[places] = image[rng.permutation(places)]
        return self.decode(torch.from_numpy(tokens))
