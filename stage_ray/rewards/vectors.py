"""Vectors of images, and of reference pictures for the same prompts: what measures of an evaluation are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ConvNextV2Model, Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel

from stage_ray.config.paths import resolve_path
from stage_ray.errors import ConfigError
from stage_ray.records import Prompt, RolloutGroup
from stage_ray.registry import import_dotted
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.clip import BatchSize
from stage_ray.rewards.models import Dtype, check_model, load_image_processor, load_model

VISION = (Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, ConvNextV2Model)
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
Reference = Callable[[Prompt, int, int], tuple[np.ndarray, int]]
"""Prompt, number of an image among all images of the evaluation, and its seed -> a picture, and that picture's number.

One picture has one number, and no two pictures the same.
"""


class VisionNetwork:
    """The pooled output of a vision model of transformers: of a DINO the class token, of a ConvNeXt V2 the mean."""

    def __init__(self, path: str, batch_size: int = 64, dtype: Dtype = "float32", device: str | None = None) -> None:
        """Load one of `VISION` and its image processor; raises as `load_model`."""
        self._model, location = load_model(*VISION, path=path, dtype=dtype, device=device)
        self._processor, self._batch_size = load_image_processor(location), batch_size

    @classmethod
    def check(cls, path: str) -> None:
        """Check a checkpoint that lies here; raises as `check_model`."""
        if (location := check_model(*VISION, path=path, tensors=False)) is not None:
            load_image_processor(location)

    @torch.inference_mode()
    def vectors(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Float32 [B, D] of B images, uint8 [H, W, 3] each."""
        rows = []
        for start in range(0, len(images), self._batch_size):
            pictures = [Image.fromarray(image) for image in images[start : start + self._batch_size]]
            pixels = self._processor(pictures, return_tensors="pt")["pixel_values"]
            output = self._model(pixels.to(self._model.device, self._model.dtype))
            rows.append(output.pooler_output.flatten(1).float().cpu().numpy())
        return np.concatenate(rows)


class VectorsReward:
    """Features, float32 [B, 2 D + 1]: an image's vector, its reference picture's, and the number of that picture.

    Without ``reference`` the second are 0 and the number is -1. The score is the length of an image's vector, which is
    neither good nor bad: it is for measures (`stage_ray.evaluation.measures`), and no reward.
    """

    def __init__(
        self,
        path: str = "facebook/dinov2-base",
        reference: str | None = None,
        batch_size: BatchSize = 64,
        dtype: Dtype = "float32",
        device: str | None = None,
    ) -> None:
        """Load the network; path, batch_size, dtype, device: as of `ClipReward`, of a `VisionNetwork`.

        ``reference``: a directory of pictures, of which an evaluation takes as many as it draws, or all; or
        ``package.module.function``, which draws one from a `Prompt` and a seed: uint8 [H, W, 3].
        """
        self._network, self._reference = VisionNetwork(path, batch_size, dtype, device), reference_of(reference)

    @classmethod
    def check(
        cls,
        prompts: Sequence[Prompt],
        path: str = "facebook/dinov2-base",
        reference: str | None = None,
        **options: Any,
    ) -> Iterator[tuple[Prompt, str]]:
        """Check a local checkpoint and the reference; see `Reward`. Prompts of which none can be drawn are named."""
        VisionNetwork.check(path)
        draw = reference_of(reference)
        for prompt in prompts:
            try:
                if draw is None:
                    return
                draw(prompt, 0, 0)
            except (KeyError, ValueError, OSError) as error:
                yield prompt, f"{reference} gives no picture for it: {error!r}"

    def score_groups(self, groups: Sequence[RolloutGroup]) -> RewardOutput:
        """The features of whole groups."""
        images = [image for group in groups for image in group.images]
        own = self._network.vectors(images)
        theirs, numbers = np.zeros_like(own), np.full((len(images), 1), -1, np.float32)
        if self._reference is not None:
            found = [
                self._reference(group.prompt, group.prompt.index * len(group.seeds) + image, seed)
                for group in groups
                for image, seed in enumerate(group.seeds)
            ]
            theirs = self._network.vectors([picture for picture, _ in found])
            numbers[:, 0] = [number for _, number in found]
        features = np.concatenate([own, theirs, numbers], axis=1)
        lengths = np.linalg.norm(own, axis=1)
        return RewardOutput(lengths, np.isfinite(lengths), tuple({} for _ in images), features)


def reference_of(location: str | None) -> Reference | None:
    """What draws or reads reference pictures; None without any.

    Raises:
        ConfigError: nothing is there, a directory without pictures, or no function.
    """
    if location is None:
        return None
    dotted = "/" not in location and ":" not in location and "." in location and not Path(location).exists()
    return _drawn(location) if dotted else _read(resolve_path(location))


def _drawn(name: str) -> Reference:
    draw = import_dotted(name, "reference")
    if not callable(draw):
        raise ConfigError(f"reference = {name!r} is no function of a prompt and a seed")
    return lambda prompt, number, seed: (draw(prompt, seed), number)


def _read(directory: Path) -> Reference:
    files = sorted(path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigError(f"reference: {directory} holds no pictures ({', '.join(sorted(SUFFIXES))})")

    def read(prompt: Prompt, number: int, seed: int) -> tuple[np.ndarray, int]:
        with Image.open(files[number % len(files)]) as picture:
            return np.asarray(picture.convert("RGB")), number % len(files)

    return read
