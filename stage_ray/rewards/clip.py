"""CLIP and SigLIP as a reward: cosine similarity of picture and prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor
from transformers import CLIPModel, SiglipModel

from stage_ray.records import Prompt
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.models import (
    Dtype,
    check_model,
    load_image_processor,
    load_model,
    load_tokenizer,
    processor_directory,
)

KINDS = (CLIPModel, SiglipModel)
BatchSize = Annotated[int, Field(ge=1)]


class ClipReward:
    """Cosine similarity of any transformers CLIP (arXiv 2103.00020) or SigLIP (arXiv 2303.15343), times ``scale``.

    Details of an image: ``cosine``, in -1..1. The features are the images' unit vectors.
    """

    def __init__(
        self,
        path: str,
        processor: str | None = None,
        scale: float = 1.0,
        batch_size: BatchSize = 64,
        dtype: Dtype = "float32",
        device: str | None = None,
    ) -> None:
        """Load the checkpoint; no code that comes with it is run.

        Args:
            path: a directory, ``package:MODULE/DIR``, or a hub id, ``OWNER/NAME[@REVISION]``.
            processor: the same, with tokenizer and image processor, where they are not beside the weights.
            scale: factor on the cosine; CLIPScore (arXiv 2104.08718) uses 2.5.
            batch_size: images in one forward pass.
            dtype: what it computes in.
            device: a torch device; a GPU where this process sees one, by default.
        """
        model, location = load_model(*KINDS, path=path, dtype=dtype, device=device)
        self._towers = Towers(model, *processors(location, processor), batch_size)
        self._scale = scale

    @classmethod
    def check(
        cls, prompts: Sequence[Prompt], path: str, processor: str | None = None, **options: Any
    ) -> Iterator[tuple[Prompt, str]]:
        """Check a local checkpoint down to the shapes of its tensors; see `Reward`. It judges every prompt."""
        if (location := check_model(*KINDS, path=path)) is not None:
            processors(location, processor)
        return iter(())

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt's text (cut at the context length)."""
        return self._towers.score(images, prompts, self._scale)


class Towers:
    """The two encoders of a CLIP or SigLIP model.

    Attributes:
        logit_scale: the model's own factor on cosines.
    """

    def __init__(self, model: Any, tokenizer: Any, pixels: Callable[[np.ndarray], Tensor], batch_size: int) -> None:
        """``pixels`` makes float32 [B, 3, h, w] of images, uint8 [B, H, W, 3]."""
        self._model, self._tokenizer, self._pixels, self._batch_size = model, tokenizer, pixels, batch_size
        self.logit_scale = float(model.logit_scale.detach().exp())

    def score(self, images: np.ndarray, prompts: Sequence[Prompt], scale: float) -> RewardOutput:
        """Cosines of images, uint8 [B, H, W, 3], and their prompts, times ``scale``."""
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))  # a group shares its prompt: encode it once
        text_rows, image_rows = self.texts(texts), self.images(images)
        wanted = [texts.index(prompt.text) for prompt in prompts]
        cosine = (image_rows * text_rows[wanted]).sum(-1).cpu().numpy()  # [B], of unit vectors
        scores = np.asarray(scale * cosine, np.float32)
        details = tuple({"cosine": float(value)} for value in cosine)
        return RewardOutput(scores, np.isfinite(scores), details, image_rows.cpu().numpy())

    @torch.inference_mode()
    def images(self, images: np.ndarray) -> Tensor:
        """Unit vectors, float32 [B, P]."""
        return self._batched(self._image_batch, images)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [len(texts), P]."""
        return self._batched(self._text_batch, list(texts))

    def _text_batch(self, texts: Sequence[str]) -> Tensor:
        config = self._model.config
        length = config.text_config.max_position_embeddings  # the context length
        # SigLIP was trained on texts that fill its context, and knows no mask.
        siglip = config.model_type == SiglipModel.config_class.model_type
        padding = "max_length" if siglip else True
        tokens = self._tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        names = ("input_ids",) if siglip else ("input_ids", "attention_mask")
        output = self._model.get_text_features(**{name: tokens[name].to(self._model.device) for name in names})
        return F.normalize(output.pooler_output.float(), dim=-1)

    def _image_batch(self, images: np.ndarray) -> Tensor:
        pixels = self._pixels(images).to(self._model.device, self._model.dtype)
        return F.normalize(self._model.get_image_features(pixels).pooler_output.float(), dim=-1)

    def _batched(self, encode: Callable[[Any], Tensor], items: Any) -> Tensor:
        size = self._batch_size
        return torch.cat([encode(items[i : i + size]) for i in range(0, len(items), size)])


def processors(location: Path, processor: str | None) -> tuple[Any, Callable[[np.ndarray], Tensor]]:
    """Tokenizer, and what makes pixels, float32 [B, 3, h, w], of images, uint8 [B, H, W, 3].

    Raises:
        ConfigError: one of them is missing or damaged.
    """
    if processor is not None:
        location = processor_directory(processor)
    key = "path" if processor is None else "processor"
    prepare = load_image_processor(location, key)
    return load_tokenizer(location, key), lambda images: prepare(
        [Image.fromarray(image) for image in images], return_tensors="pt"
    )["pixel_values"]
