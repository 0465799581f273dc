"""Trains the detector's shape classifier, on renders and on what the tokenizer makes of them.

It also learns from wrong objects (WRONG), since a policy draws things between a clear shape and a smear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor
from transformers import JanusVQVAE

from stage_ray.shapeworld.detector import CLASSES, CROP_SIZE, NONE, WEIGHTS_FILE, build_classifier, crop_segments
from stage_ray.shapeworld.pretrain.loop import Budget, TrainingRun
from stage_ray.shapeworld.pretrain.tokenizer import load_exported, random_images, reconstruct
from stage_ray.shapeworld.scene import COLORS, SHAPES, Shape, coverage, on_random_paper, place_squares, render
from stage_ray.shapeworld.segmentation import Segment, segment

CHECKPOINT = "work/training/detector.safetensors"
BATCH = 256
CHUNK = 64  # pictures segmented at once
RANDOM_SHARE = 3 / 16  # pictures decoded from random tokens, as a share of the drawn ones
WRONG_SHARE = 0.5  # of the drawn objects
WRONG = ("turned", "squeezed", "cut", "bitten", "merged", "between", "wobbly", "blob", "washed")


def train_detector(out: Path, budget: Budget, pictures: int, seed: int) -> None:
    """Train (or resume) the classifier on the CPU; writes `out/detector/model.safetensors`.

    Each picture is seen twice: as drawn or degraded, and as the tokenizer's reconstruction.
    """
    torch.manual_seed(seed)
    crops, labels = _dataset(np.random.default_rng(seed), load_exported(out / "janus"), pictures // CHUNK)
    # Gentler than 1 / frequency: "none" has the most crops, and it is also the most varied class.
    weight = (torch.bincount(labels, minlength=len(CLASSES)) / len(labels)).clamp(min=1e-3).rsqrt()
    model = build_classifier()
    run = TrainingRun(out / CHECKPOINT, model, 2e-3, budget, warmup=0.3)
    for step, _ in run:
        generator = torch.Generator().manual_seed(2**20 * seed + step)
        chosen = torch.randint(len(crops), (BATCH,), generator=generator)
        logits = model(_augment(crops[chosen], generator) - 0.5)
        run.descend(F.cross_entropy(logits, labels[chosen], weight=weight / weight.mean()))
    (out / "detector").mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out / "detector" / WEIGHTS_FILE, metadata={"classes": ",".join(CLASSES)})


def _dataset(rng: np.random.Generator, tokenizer: JanusVQVAE, chunks: int) -> tuple[Tensor, Tensor]:
    """Crops float32 [K, 1, 24, 24] and labels int64 [K]; in pictures of random tokens nothing is a shape."""
    crops: list[Tensor] = []
    labels: list[int] = []

    def add(images: np.ndarray, truth: Sequence[tuple[np.ndarray, list[int]]]) -> None:
        pieces = segment(images)
        answers = [_label(piece, *truth[piece.image]) if truth else NONE for piece in pieces]
        crops.append(crop_segments([one for one, answer in zip(pieces, answers, strict=True) if answer is not None]))
        labels.extend(answer for answer in answers if answer is not None)

    for _ in range(chunks):
        examples = [_draw(rng) for _ in range(CHUNK)]
        drawn, truth = np.stack([one[0] for one in examples]), [one[1:] for one in examples]
        add(np.stack([_degrade(image, rng) if rng.random() < 0.6 else image for image in drawn]), truth)
        add(reconstruct(tokenizer, drawn), truth)
    for _ in range(int(RANDOM_SHARE * chunks)):
        add(random_images(tokenizer, CHUNK, rng), ())
    return torch.cat(crops), torch.tensor(labels)


def _augment(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, shift and scale by a pixel or so, and change the opacity a little."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(crops), generator=generator)

    theta = torch.zeros(len(crops), 2, 3)
    zoom = uniform(0.94, 1.06)
    theta[:, 0, 0] = zoom * torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = zoom
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * 2 / CROP_SIZE, uniform(-1, 1) * 2 / CROP_SIZE
    moved = F.grid_sample(crops, F.affine_grid(theta, list(crops.shape), align_corners=False), align_corners=False)
    return (moved * uniform(0.9, 1.1)[:, None, None, None]).clamp(0, 1)


def _draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A picture of 1 to 4 objects, uint8 [64, 64, 3]; where each is, bool [n, 64, 64]; and its index into CLASSES."""
    count = int(rng.choice([1, 2, 3, 4], p=[0.2, 0.3, 0.25, 0.25]))
    # Smaller and larger than in the world: generated objects are not as regular as rendered ones.
    low, high = {1: (16.0, 42.0), 2: (15.0, 27.0), 3: (15.0, 22.0), 4: (15.0, 20.0)}[count]
    canvas = render(on_random_paper((), rng)).astype(np.float32)
    masks, labels = [], []
    for place in place_squares(rng.uniform(low, high, size=count).tolist(), rng):
        shape = Shape(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))), *place)
        wrong = rng.random() < WRONG_SHARE
        opacity = _spoil(WRONG[int(rng.integers(len(WRONG)))], shape, rng) if wrong else _mild(shape, rng)
        paint = np.asarray(COLORS[shape.color], np.float32) + rng.normal(0, 4, 3)
        canvas += opacity[..., None] * (paint + rng.normal(0, 3, canvas.shape) - canvas)
        masks.append(opacity >= 0.5)
        labels.append(NONE if wrong else CLASSES.index(shape.kind))
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), np.stack(masks), labels


def _label(piece: Segment, masks: np.ndarray, labels: list[int]) -> int | None:
    """The class of a segment found in (a version of) a picture of these objects; None where the truth is unclear."""
    overlap = (masks & piece.mask).sum((1, 2))
    if (overlap > 0.5 * masks.sum((1, 2))).sum() > 1:
        return NONE  # several objects at once
    share = overlap / np.maximum((masks | piece.mask).sum((1, 2)), 1)
    best = int(share.argmax())
    if share[best] >= 0.65:
        return labels[best]
    # A fragment of a good shape is none; something in between is left out of training.
    return NONE if share[best] < 0.4 or labels[best] == NONE else None


def _degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a lossy tokenizer does, simulated: blur, drifting colours, a contrast change, noise. uint8 [64, 64, 3]."""
    pixels = ndimage.gaussian_filter(image.astype(np.float32), sigma=(*([rng.uniform(0.3, 1.2)] * 2), 0))
    drift = ndimage.gaussian_filter(rng.normal(0, 1, pixels.shape), sigma=(6, 6, 0))
    pixels += drift / max(float(np.abs(drift).max()), 1e-6) * rng.uniform(0, 24)
    pixels = 255 - (255 - pixels) * rng.uniform(0.85, 1.05) + rng.normal(0, rng.uniform(0, 4), pixels.shape)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def _transform(shape: Shape, angle: float, stretch: tuple[float, float]) -> np.ndarray:
    """The shape's coverage, turned by `angle` (radians) and stretched (x, y) about its centre."""
    cosine, sine = np.cos(angle), np.sin(angle)
    inverse = np.asarray([[cosine, sine], [-sine, cosine]]) / np.asarray([[stretch[1]], [stretch[0]]])
    centre = np.asarray([shape.cy, shape.cx]) - 0.5
    moved = ndimage.affine_transform(coverage(shape), inverse, offset=centre - inverse @ centre, order=1)
    return np.clip(moved, 0.0, 1.0)


def _elastic(opacity: np.ndarray, rng: np.random.Generator, pixels: float) -> np.ndarray:
    """Push pixels about by a smooth random field of at most `pixels`."""
    field = ndimage.gaussian_filter(rng.normal(0, 1, (2, *opacity.shape)), sigma=(0, 4, 4))
    field *= pixels / max(float(np.abs(field).max()), 1e-6)
    return np.asarray(ndimage.map_coordinates(opacity, np.indices(opacity.shape) + field, order=1))


def _mild(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """What still counts as the shape: 7 degrees, a tenth of stretch, a pixel of wobble."""
    if rng.random() < 0.5:
        return coverage(shape)
    stretch = (rng.uniform(0.9, 1.1), rng.uniform(0.9, 1.1))
    return _elastic(_transform(shape, rng.uniform(-0.12, 0.12), stretch), rng, rng.uniform(0, 1.0))


def _spoil(how: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Coverage [64, 64] in 0..1 of what must count as "none": the shape made wrong in a way of WRONG."""
    whole, radius = coverage(shape), shape.size / 2
    y, x = np.indices(whole.shape) + 0.5 - np.reshape([shape.cy, shape.cx], (2, 1, 1))  # from the shape's centre
    if how == "squeezed" or (how == "turned" and shape.kind in ("circle", "ring")):
        factor = rng.uniform(0.4, 0.66)
        return _transform(shape, 0.0, (factor, 1.0) if rng.random() < 0.5 else (1.0, factor))
    if how == "turned":
        low, high = (0.7, 5.6) if shape.kind == "triangle" else (0.45, 1.12)
        return _transform(shape, rng.uniform(low, high), (0.9, 0.9))
    if how == "cut":
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.35) * radius
        return whole * (x * np.cos(angle) + y * np.sin(angle) < reach)
    if how == "bitten":
        angle, bite, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.6) * radius, rng.uniform(0.5, 0.85) * radius
        left = whole * (np.hypot(x - away * np.cos(angle), y - away * np.sin(angle)) >= bite)
        # A bite beside the shape leaves it whole; then cut it instead.
        return left if left.sum() < 0.85 * whole.sum() else _spoil("cut", shape, rng)
    if how == "merged":  # two shapes of one colour that touch or overlap
        angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.8) * shape.size
        kind = str(rng.choice(SHAPES))
        cx, cy = shape.cx + float(away * np.cos(angle)), shape.cy + float(away * np.sin(angle))
        return np.maximum(whole, coverage(Shape(kind, shape.color, cx, cy, shape.size * rng.uniform(0.7, 1.0))))
    if how == "between":  # half-way between two shapes: blend the blurred outlines and cut at one half
        other = coverage(replace(shape, kind=str(rng.choice([kind for kind in SHAPES if kind != shape.kind]))))
        share = rng.uniform(0.4, 0.6)
        mixed = ndimage.gaussian_filter((1 - share) * whole + share * other, sigma=rng.uniform(1.0, 2.0))
        return np.clip((mixed - 0.45) * 6 + 0.5, 0.0, 1.0)
    if how == "wobbly":
        return _elastic(whole, rng, rng.uniform(0.25, 0.4) * shape.size)
    if how == "blob":
        noise = ndimage.gaussian_filter(rng.normal(0, 1, whole.shape), sigma=rng.uniform(2.0, 5.0))
        falloff = np.hypot(x, y) / (0.6 * shape.size)
        return np.clip((noise / noise.std() - 1.6 * (falloff - 0.6)) * 2, 0, 1) * (falloff < 1.6)
    # Washed out: blurred beyond recognition.
    blurred = ndimage.gaussian_filter(whole, sigma=rng.uniform(0.18, 0.28) * shape.size)
    return np.clip(blurred / max(float(blurred.max()), 1e-6) * rng.uniform(0.8, 1.1), 0, 1)
