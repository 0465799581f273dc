"""Trains the detector's shape classifier, on renders and on what the tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stage_ray.shapeworld.detector import ShapeDetector
from stage_ray.shapeworld.detector_card import model_card
from stage_ray.shapeworld.detector_classifier import (
    CLASSES,
    CROP_SIZE,
    NONE,
    ShapeClassifier,
    crop_segments,
    save_classifier,
)
from stage_ray.shapeworld.detector_exam import examine
from stage_ray.shapeworld.detector_examples import Example, degrade, draw_example, label_segment
from stage_ray.shapeworld.detector_segmentation import segment
from stage_ray.shapeworld.detector_tokenizer import TokenizerView

Progress = Callable[[int, int], None]  # steps done, steps in all

EXAMPLES = 4096  # pictures drawn; each is seen twice, as drawn or degraded, and as the tokenizer's reconstruction
MUSH = 768  # pictures decoded from random tokens
BATCH = 256
PEAK_LR = 2e-3
CHUNK = 64  # pictures segmented at once
CARD_THRESHOLD = 0.5  # confidence above which the card counts a detection


def train(
    out: Path, tokenizer_dir: Path | None, *, seed: int = 0, steps: int = 1200, progress: Progress | None = None
) -> None:
    """Train the classifier; write its weights and a card with its measured quality to the directory `out`.

    Args:
        out: directory of the weights.
        tokenizer_dir: a Janus checkpoint whose tokenizer the pictures will come from; None trains on renders with
            simulated blur and colour drift alone.
        seed: fixes the pictures and the training.
        steps: updates of `BATCH` crops.
        progress: called with (steps done, steps in all).
    """
    torch.manual_seed(seed)
    view = None if tokenizer_dir is None else TokenizerView.load(tokenizer_dir)
    crops, labels = _dataset(np.random.default_rng(seed), view)
    # Gentler than 1 / frequency: "none" has the most crops, and it is also the most varied class.
    frequency = torch.bincount(labels, minlength=len(CLASSES)).float() / len(labels)
    weight = frequency.clamp(min=1e-3).rsqrt()
    model = ShapeClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(crops), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(_augment(crops[chosen], generator)), labels[chosen], weight=weight / weight.mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    save_classifier(model, out)
    source = "on renders with simulated blur and drifting colours"
    if view is not None:
        source += ", on their reconstructions by the tokenizer, on pictures decoded from random tokens"
    facts = {"classes": ", ".join(CLASSES), "source": source, "seed": seed, "steps": steps, "batch": BATCH}
    report = examine(ShapeDetector(out), view, threshold=CARD_THRESHOLD)
    (out / "README.md").write_text(model_card(report, threshold=CARD_THRESHOLD, **facts), encoding="utf-8")


def _dataset(rng: np.random.Generator, view: TokenizerView | None) -> tuple[Tensor, Tensor]:
    """Crops float32 [K, 24, 24] and labels int64 [K]."""
    crops: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for images, examples in _pictures(rng, view):
        segments = segment(images)
        answers = [NONE if examples is None else label_segment(piece, examples[piece.image]) for piece in segments]
        keep = [index for index, answer in enumerate(answers) if answer is not None]
        crops.append(crop_segments([segments[index] for index in keep]))
        labels.append(np.asarray([answers[index] for index in keep], np.int64))
    return torch.from_numpy(np.concatenate(crops)), torch.from_numpy(np.concatenate(labels))


def _pictures(
    rng: np.random.Generator, view: TokenizerView | None
) -> Iterator[tuple[np.ndarray, list[Example] | None]]:
    """Chunks of pictures with their truth; None where nothing in them is a shape."""
    for _ in range(EXAMPLES // CHUNK):
        examples = [draw_example(rng) for _ in range(CHUNK)]
        drawn = np.stack([example.image for example in examples])
        yield np.stack([degrade(image, rng) if rng.random() < 0.6 else image for image in drawn]), examples
        yield (np.stack([degrade(i, rng) for i in drawn]) if view is None else view.reconstruct(drawn)), examples
    if view is not None:
        for _ in range(MUSH // CHUNK):
            yield view.random_images(CHUNK, rng), None


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
