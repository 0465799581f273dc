"""Pictures with known answers for the detector's classifier: good shapes, and regions that must count as "none".

A policy under training draws things between a clear shape and a smear. The classifier must not be fooled by them, so it
also learns from wrong objects: turned, squeezed, cut, merged, broken, half-way between two shapes, and plain blobs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from stage_ray.shapeworld.detector import CLASSES, NONE
from stage_ray.shapeworld.render import render, render_masks
from stage_ray.shapeworld.scene import COLORS, IMAGE_SIZE, SHAPES, Scene, Shape, place_squares, random_background
from stage_ray.shapeworld.segmentation import Segment

_Y, _X = np.indices((IMAGE_SIZE, IMAGE_SIZE)) + 0.5  # centres of pixels


@dataclass(frozen=True, slots=True)
class Example:
    """A picture and the truth about it.

    Attributes:
        image: uint8 [64, 64, 3].
        masks: bool [n, 64, 64], where each object is.
        labels: int64 [n], index into CLASSES.
    """

    image: np.ndarray
    masks: np.ndarray
    labels: np.ndarray


def draw_example(rng: np.random.Generator, wrong_share: float = 0.5) -> Example:
    """One picture of 1 to 4 objects, each of them wrong ("none") with the given probability."""
    count = int(rng.choice([1, 2, 3, 4], p=[0.2, 0.3, 0.25, 0.25]))
    # Smaller and larger than in the world: generated objects are not as regular as rendered ones.
    low, high = {1: (16.0, 42.0), 2: (15.0, 27.0), 3: (15.0, 22.0), 4: (15.0, 20.0)}[count]
    canvas = render(Scene((), background=random_background(rng), seed=int(rng.integers(2**31)))).astype(np.float32)
    masks, labels = [], []
    for place in place_squares([float(size) for size in rng.uniform(low, high, size=count)], rng):
        shape = Shape(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))), *place)
        wrong = rng.random() < wrong_share
        change = WRONG[int(rng.integers(len(WRONG)))] if wrong else _mild
        coverage = change(_coverage(shape), shape, rng)
        paint = np.asarray(COLORS[shape.color], np.float32) + rng.normal(0, 4, 3)
        canvas += coverage[..., None] * (paint + rng.normal(0, 3, canvas.shape) - canvas)
        masks.append(coverage >= 0.5)
        labels.append(NONE if wrong else CLASSES.index(shape.kind))
    return Example(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), np.stack(masks), np.asarray(labels))


def label_segment(piece: Segment, example: Example) -> int | None:
    """The class of a segment found in (a version of) an example's picture; None where the truth is unclear."""
    overlap = (example.masks & piece.mask).sum((1, 2))
    if (overlap > 0.5 * example.masks.sum((1, 2))).sum() > 1:
        return NONE  # several objects at once
    union = (example.masks | piece.mask).sum((1, 2))
    share = overlap / np.maximum(union, 1)
    best = int(share.argmax())
    if share[best] >= 0.65:
        return int(example.labels[best])
    # A fragment of a good shape is none; something in between is left out of training.
    return NONE if share[best] < 0.4 or example.labels[best] == NONE else None


def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a lossy tokenizer does, simulated: blur, drifting colours, a contrast change, noise. uint8 [64, 64, 3]."""
    pixels = image.astype(np.float32)
    pixels = ndimage.gaussian_filter(pixels, sigma=(*([rng.uniform(0.3, 1.2)] * 2), 0))
    drift = ndimage.gaussian_filter(rng.normal(0, 1, pixels.shape), sigma=(6, 6, 0))
    pixels += drift / max(float(np.abs(drift).max()), 1e-6) * rng.uniform(0, 24)
    pixels = 255 - (255 - pixels) * rng.uniform(0.85, 1.05) + rng.normal(0, rng.uniform(0, 4), pixels.shape)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def _coverage(shape: Shape) -> np.ndarray:
    return np.asarray(render_masks(Scene((shape,)))[0])


def _transform(coverage: np.ndarray, shape: Shape, angle: float, stretch: tuple[float, float]) -> np.ndarray:
    """Turn by `angle` (radians) and stretch (x, y) about the shape's centre."""
    cosine, sine = np.cos(angle), np.sin(angle)
    inverse = np.asarray([[cosine, sine], [-sine, cosine]]) / np.asarray([[stretch[1]], [stretch[0]]])
    centre = np.asarray([shape.cy, shape.cx]) - 0.5
    moved = ndimage.affine_transform(coverage, inverse, offset=centre - inverse @ centre, order=1)
    return np.clip(moved, 0.0, 1.0)


def _elastic(coverage: np.ndarray, rng: np.random.Generator, pixels: float) -> np.ndarray:
    """Push pixels about by a smooth random field of at most `pixels`."""
    field = ndimage.gaussian_filter(rng.normal(0, 1, (2, IMAGE_SIZE, IMAGE_SIZE)), sigma=(0, 4, 4))
    field *= pixels / max(float(np.abs(field).max()), 1e-6)
    return np.asarray(ndimage.map_coordinates(coverage, np.indices(coverage.shape) + field, order=1))


def _mild(coverage: np.ndarray, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """What still counts as the shape: 7 degrees, a tenth of stretch, a pixel of wobble."""
    if rng.random() < 0.5:
        return coverage
    stretch = (float(rng.uniform(0.9, 1.1)), float(rng.uniform(0.9, 1.1)))
    coverage = _transform(coverage, shape, float(rng.uniform(-0.12, 0.12)), stretch)
    return _elastic(coverage, rng, float(rng.uniform(0, 1.0)))


# What must count as "none". Each takes an object's coverage [64, 64] in 0..1 and gives that of the wrong object.


def _turned(coverage: np.ndarray, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    if shape.kind in ("circle", "ring"):
        return _squeezed(coverage, shape, rng)
    low, high = (0.7, 5.6) if shape.kind == "triangle" else (0.45, 1.12)
    return _transform(coverage, shape, float(rng.uniform(low, high)), (0.9, 0.9))


def _squeezed(coverage: np.ndarray, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    factor = float(rng.uniform(0.4, 0.66))
    return _transform(coverage, shape, 0.0, (factor, 1.0) if rng.random() < 0.5 else (1.0, factor))


def _cut(coverage: np.ndarray, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.35) * shape.size / 2
    return coverage * ((_X - shape.cx) * np.cos(angle) + (_Y - shape.cy) * np.sin(angle) < reach)


def _bitten(coverage: np.ndarray, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.6) * shape.size / 2
    away = rng.uniform(0.5, 0.85) * shape.size / 2
    kept = np.hypot(_X - shape.cx - away * np.cos(angle), _Y - shape.cy - away * np.sin(angle)) >= radius
    left = coverage * kept
    # A bite beside the shape leaves it whole; then cut it instead.
    return left if left.sum() < 0.85 * coverage.sum() else _cut(coverage, shape, rng)


def _merged(coverage: np.ndarray, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Two shapes of one colour that touch or overlap."""
    angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.8) * shape.size
    kind = str(rng.choice(SHAPES))
    cx, cy = shape.cx + float(away * np.cos(angle)), shape.cy + float(away * np.sin(angle))
    other = Shape(kind, shape.color, cx, cy, shape.size * float(rng.uniform(0.7, 1.0)))
    return np.maximum(coverage, _coverage(other))


def _between(coverage: np.ndarray, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Half-way between two shapes: blend the blurred outlines and cut at one half."""
    kind = str(rng.choice([kind for kind in SHAPES if kind != shape.kind]))
    other = _coverage(replace(shape, kind=kind))
    share = rng.uniform(0.4, 0.6)
    mixed = ndimage.gaussian_filter((1 - share) * coverage + share * other, sigma=float(rng.uniform(1.0, 2.0)))
    return np.clip((mixed - 0.45) * 6 + 0.5, 0.0, 1.0)


def _wobbly(coverage: np.ndarray, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    return _elastic(coverage, rng, float(rng.uniform(0.25, 0.4) * shape.size))


def _blob(coverage: np.ndarray, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    noise = ndimage.gaussian_filter(rng.normal(0, 1, coverage.shape), sigma=float(rng.uniform(2.0, 5.0)))
    falloff = np.hypot(_X - shape.cx, _Y - shape.cy) / (0.6 * shape.size)
    return np.clip((noise / noise.std() - 1.6 * (falloff - 0.6)) * 2, 0, 1) * (falloff < 1.6)


def _washed(coverage: np.ndarray, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """A smear: blurred beyond recognition."""
    blurred = ndimage.gaussian_filter(coverage, sigma=float(rng.uniform(0.18, 0.28) * shape.size))
    return np.clip(blurred / max(float(blurred.max()), 1e-6) * rng.uniform(0.8, 1.1), 0, 1)


WRONG = (_turned, _squeezed, _cut, _bitten, _merged, _between, _wobbly, _blob, _washed)
