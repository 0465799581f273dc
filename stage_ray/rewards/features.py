"""DINOv2 as a measure of diversity: vectors of the images, and how far each is from the others of its group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from stage_ray.records import Prompt, RolloutGroup
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.clip import BatchSize
from stage_ray.rewards.models import Dtype
from stage_ray.rewards.vectors import VisionNetwork


class FeaturesReward:
    """The mean cosine distance of an image to its group's others by DINOv2 (arXiv 2304.07193): 0..2, 0 where all agree.

    The features are unit vectors, of a DINO those of its class token; recipes such as ``diverse_grpo`` read them, with
    a weight of 0.
    """

    def __init__(
        self,
        path: str = "facebook/dinov2-base",
        batch_size: BatchSize = 64,
        dtype: Dtype = "float32",
        device: str | None = None,
    ) -> None:
        """Load the checkpoint (Apache-2.0); path, batch_size, dtype, device: as of `ClipReward`."""
        self._network = VisionNetwork(path, batch_size, dtype, device)

    @classmethod
    def check(
        cls, prompts: Sequence[Prompt], path: str = "facebook/dinov2-base", **options: Any
    ) -> Iterator[tuple[Prompt, str]]:
        """Check a local checkpoint; see `Reward`. It judges every prompt."""
        VisionNetwork.check(path)
        return iter(())

    def score_groups(self, groups: Sequence[RolloutGroup]) -> RewardOutput:
        """Score whole groups; a group of one image has no others, and no score."""
        vectors = [self.vectors(group.images) for group in groups]
        # The mean over the others: all of a row's products but the one with itself, which is 1. Without others NaN.
        distances = [1 - ((rows @ rows.T).sum(1) - 1) / (len(rows) - 1 or np.nan) for rows in vectors]
        scores = torch.cat(distances).numpy()
        return RewardOutput(scores, np.isfinite(scores), tuple({} for _ in scores), torch.cat(vectors).numpy())

    def vectors(self, images: np.ndarray) -> torch.Tensor:
        """Unit vectors, float32 [B, D], of images, uint8 [B, H, W, 3]."""
        return F.normalize(torch.from_numpy(self._network.vectors(images)), dim=-1)
