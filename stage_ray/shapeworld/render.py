"""Draws a scene: antialiased signed-distance shapes over a pale, softly textured background. Under a millisecond."""

from __future__ import annotations

import numpy as np

from stage_ray.shapeworld.scene import BACKGROUNDS, COLORS, IMAGE_SIZE, Scene, Shape

NOISE_SIGMA = 3.0  # grey levels of 255
TEXTURE_AMPLITUDE = 4.0  # grey levels of 255
MIN_STROKE = 5.0  # pixels: arms of the cross, band of the ring

_CENTRES = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5  # pixel i covers [i, i + 1)
_X, _Y = np.meshgrid(_CENTRES, _CENTRES)


def _distance(shape: Shape) -> np.ndarray:
    """Signed distance [64, 64] float32 in pixels to the shape's outline, negative inside."""
    x, y, half = _X - shape.cx, _Y - shape.cy, shape.size / 2
    if shape.kind == "circle":
        return np.hypot(x, y) - half
    if shape.kind == "ring":
        stroke = max(MIN_STROKE, 0.25 * shape.size)
        return np.abs(np.hypot(x, y) - (half - stroke / 2)) - stroke / 2
    if shape.kind == "triangle":  # apex at the top centre of the bounding square, base along its lower edge
        return np.maximum((np.abs(x) * 2 - (y + half)) / np.sqrt(5.0), y - half)
    x, y = np.abs(x), np.abs(y)
    if shape.kind == "square":
        return np.maximum(x - half, y - half)
    arm = max(MIN_STROKE, 0.32 * shape.size) / 2  # of a cross: the nearer of two bars
    return np.minimum(np.maximum(x - half, y - arm), np.maximum(x - arm, y - half))


def render_masks(scene: Scene) -> np.ndarray:
    """Exact coverage of each object: float32 [n, 64, 64] in 0..1, in the order of `scene.shapes`."""
    masks = [np.clip(0.5 - _distance(shape), 0.0, 1.0) for shape in scene.shapes]
    return np.asarray(masks, np.float32).reshape(-1, IMAGE_SIZE, IMAGE_SIZE)


def render(scene: Scene, *, plain: bool = False) -> np.ndarray:
    """The picture of a scene: uint8 [64, 64, 3], RGB. The same scene always gives the same pixels.

    `plain` leaves out texture and noise: paper of one tint.
    """
    return render_with_masks(scene, plain=plain)[0]


def render_with_masks(scene: Scene, *, plain: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`render` and `render_masks` in one pass: uint8 [64, 64, 3] and float32 [n, 64, 64]."""
    rng = np.random.default_rng(scene.seed)
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUNDS[scene.background], np.float32)
    if not plain:  # three long waves
        low, high = (-0.12, -0.12, 0.0), (0.12, 0.12, 2 * np.pi)
        waves = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
        for kx, ky, phase in rng.uniform(low, high, size=(3, 3)).astype(np.float32):
            waves += np.cos(kx * _X + ky * _Y + phase)
        canvas += (TEXTURE_AMPLITUDE / 3 * waves)[..., None]
    masks = render_masks(scene)
    for mask, shape in zip(masks, scene.shapes, strict=True):
        canvas += mask[..., None] * (np.asarray(COLORS[shape.color], np.float32) - canvas)
    if not plain:
        canvas += NOISE_SIGMA * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), masks
