"""DINOv2 as a measure of diversity: vectors of the images, and how far each is from the others of its group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Dinov2Model

from stage_ray.records import Prompt, RolloutGroup
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.clip import BatchSize
from stage_ray.rewards.models import Dtype, check_model, load_image_processor, load_model


class FeaturesReward:
    """The mean cosine distance of an image to its group's others by DINOv2 (arXiv 2304.07193): 0..2, 0 where all agree.

    The features are the class token's unit vectors; recipes such as ``diverse_grpo`` read them, with a weight of 0.
    """

    def __init__(
        self,
        path: str = "facebook/dinov2-base",
        batch_size: BatchSize = 64,
        dtype: Dtype = "float32",
        device: str | None = None,
    ) -> None:
        """Load the checkpoint (Apache-2.0); path, batch_size, dtype, device: as of `ClipReward`."""
        self._model, location = load_model(Dinov2Model, path=path, dtype=dtype, device=device)
        self._processor, self._batch_size = load_image_processor(location), batch_size

    @classmethod
    def check(
        cls, prompts: Sequence[Prompt], path: str = "facebook/dinov2-base", **options: Any
    ) -> Iterator[tuple[Prompt, str]]:
        """Check a local checkpoint; see `Reward`. It judges every prompt."""
        if (location := check_model(Dinov2Model, path=path, tensors=False)) is not None:
            load_image_processor(location)
        return iter(())

    def score_groups(self, groups: Sequence[RolloutGroup]) -> RewardOutput:
        """Score whole groups; a group of one image has no others, and no score."""
        vectors = [self.vectors(group.images) for group in groups]
        # The mean over the others: all of a row's products but the one with itself, which is 1. Without others NaN.
        distances = [1 - ((rows @ rows.T).sum(1) - 1) / (len(rows) - 1 or np.nan) for rows in vectors]
        scores = torch.cat(distances).numpy()
        return RewardOutput(scores, np.isfinite(scores), tuple({} for _ in scores), torch.cat(vectors).numpy())

    @torch.inference_mode()
    def vectors(self, images: np.ndarray) -> torch.Tensor:
        """Unit vectors, float32 [B, D], of images, uint8 [B, H, W, 3]."""
        rows = []
        for start in range(0, len(images), self._batch_size):
            pictures = [Image.fromarray(image) for image in images[start : start + self._batch_size]]
            pixels = self._processor(pictures, return_tensors="pt")["pixel_values"]
            output = self._model(pixels.to(self._model.device, self._model.dtype))
            rows.append(F.normalize(output.last_hidden_state[:, 0].float(), dim=-1).cpu())
        return torch.cat(rows)
