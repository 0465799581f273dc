"""Trains the detector's shape classifier, on renders and on what the tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stage_ray.shapeworld.detector import CLASSES, CROP_SIZE, NONE, ShapeClassifier, crop_segments
from stage_ray.shapeworld.pretrain.detector_examples import Example, degrade, draw_example, label_segment
from stage_ray.shapeworld.pretrain.loop import Budget, TrainingRun
from stage_ray.shapeworld.pretrain.tokenizer_view import TokenizerView
from stage_ray.shapeworld.segmentation import segment

CHECKPOINT = "training/detector.safetensors"
BATCH = 256
PEAK_LR = 2e-3
CHUNK = 64  # pictures segmented at once
RANDOM_SHARE = 3 / 16  # pictures decoded from random tokens, as a share of the drawn ones


def train_detector(work: Path, tokenizer: TokenizerView, budget: Budget, pictures: int, seed: int = 0) -> None:
    """Train (or resume) the classifier on the CPU; writes `work/training/detector.safetensors`.

    Args:
        work: directory of the working files.
        tokenizer: makes half of the pictures less regular than rendered ones.
        budget: steps of `BATCH` crops.
        pictures: pictures drawn, a multiple of `CHUNK`; each is seen twice, as drawn or degraded, and as the
            tokenizer's reconstruction.
        seed: fixes the pictures and the training.
    """
    torch.manual_seed(seed)
    crops, labels = _dataset(np.random.default_rng(seed), tokenizer, pictures // CHUNK)
    # Gentler than 1 / frequency: "none" has the most crops, and it is also the most varied class.
    weight = (torch.bincount(labels, minlength=len(CLASSES)) / len(labels)).clamp(min=1e-3).rsqrt()
    model = ShapeClassifier()
    run = TrainingRun(work / CHECKPOINT, model, PEAK_LR, budget, warmup=0.3)
    for step, _ in run:
        generator = torch.Generator().manual_seed(2**20 * seed + step)
        chosen = torch.randint(len(crops), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(_augment(crops[chosen], generator)), labels[chosen], weight=weight / weight.mean())
        run.descend(loss)
        run.report(loss=loss.item())


def _dataset(rng: np.random.Generator, tokenizer: TokenizerView, chunks: int) -> tuple[Tensor, Tensor]:
    """Crops float32 [K, 24, 24] and labels int64 [K]."""
    crops: list[np.ndarray] = []
    labels: list[int] = []
    for images, examples in _pictures(rng, tokenizer, chunks):
        segments = segment(images)
        answers = [NONE if examples is None else label_segment(piece, examples[piece.image]) for piece in segments]
        crops.append(
            crop_segments([piece for piece, answer in zip(segments, answers, strict=True) if answer is not None])
        )
        labels += [answer for answer in answers if answer is not None]
    return torch.from_numpy(np.concatenate(crops)), torch.tensor(labels)


def _pictures(
    rng: np.random.Generator, tokenizer: TokenizerView, chunks: int
) -> Iterator[tuple[np.ndarray, list[Example] | None]]:
    """Chunks of pictures with their truth; None where nothing in them is a shape."""
    for _ in range(chunks):
        examples = [draw_example(rng) for _ in range(CHUNK)]
        drawn = np.stack([example.image for example in examples])
        yield np.stack([degrade(image, rng) if rng.random() < 0.6 else image for image in drawn]), examples
        yield tokenizer.reconstruct(drawn), examples
    for _ in range(int(RANDOM_SHARE * chunks)):
        yield tokenizer.random_images(CHUNK, rng), None


def _augment(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, shift and scale by a pixel or so, and change the opacity a little."""
    count = len(crops)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    theta = torch.zeros(count, 2, 3)
    zoom = uniform(0.94, 1.06)
    theta[:, 0, 0] = zoom * torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = zoom
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * 2 / CROP_SIZE, uniform(-1, 1) * 2 / CROP_SIZE
    grid = F.affine_grid(theta, [count, 1, CROP_SIZE, CROP_SIZE], align_corners=False)
    moved = F.grid_sample(crops[:, None], grid, align_corners=False)[:, 0]
    return (moved * uniform(0.9, 1.1)[:, None, None]).clamp(0, 1)
