"""LAION's aesthetic predictor V2: a small head over the picture's CLIP vector. It looks at no prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPModel

from stage_ray.records import Prompt
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.clip import BatchSize, Towers, processors
from stage_ray.rewards.models import Dtype, check_model, fill, load_model, read_state

WIDTHS = (1024, 128, 64, 16, 1)
DROPOUTS = 3  # layers with a dropout behind them


class AestheticReward:
    """About 1..10, most pictures 4..7. Easily hacked by saturated colours: weigh it with something else.

    The features are the images' unit vectors.
    """

    def __init__(
        self,
        head: str,
        path: str = "openai/clip-vit-large-patch14",
        batch_size: BatchSize = 64,
        dtype: Dtype = "float32",
        device: str | None = None,
    ) -> None:
        """Load both.

        Args:
            head: ``sac+logos+ava1-l14-linearMSE.pth`` of christophschuhmann/improved-aesthetic-predictor (Apache-2.0).
            path: the CLIP that the head was made for; batch_size, dtype, device: as of `ClipReward`.
        """
        model, location = load_model(CLIPModel, path=path, dtype=dtype, device=device)
        self._towers = Towers(model, *processors(location, None), batch_size)
        self._head = Head(model.config.projection_dim).eval()
        fill(self._head, read_state(head, "head"), head, key="head")
        self._head.to(model.device)

    @classmethod
    def check(
        cls, prompts: Sequence[Prompt], head: str, path: str = "openai/clip-vit-large-patch14", **options: Any
    ) -> Iterator[tuple[Prompt, str]]:
        """Check head and checkpoint where they lie here; see `Reward`. It judges every prompt."""
        state = read_state(head, "head")
        if (location := check_model(CLIPModel, path=path)) is not None:
            processors(location, None)
            width = CLIPModel.config_class.from_pretrained(location).projection_dim
            fill(Head(width), state, head, check=True, key="head")
        return iter(())

    @torch.inference_mode()
    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3]."""
        vectors = self._towers.images(images)  # of unit length: the head was trained on such
        scores = self._head(vectors).cpu().numpy()
        return RewardOutput(scores, np.isfinite(scores), tuple({} for _ in scores), vectors.cpu().numpy())


class Head(nn.Module):
    """Linear layers from a vector to a score, under the published names: ``layers.0.weight`` and so on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise((width, *WIDTHS))):
            layers.append(nn.Linear(before, after))
            if index < DROPOUTS:
                layers.append(nn.Dropout())  # does nothing here, and is counted in the names
        self.layers = nn.Sequential(*layers)

    def forward(self, vectors: Tensor) -> Tensor:
        """Scores, float32 [B], of vectors [B, width]."""
        return self.layers(vectors.float()).squeeze(-1)
