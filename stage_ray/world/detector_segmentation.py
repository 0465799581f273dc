"""Cuts a ShapeWorld picture into single-coloured objects, by plain image processing; no learning here.

The palette is known, so a pixel is explained as ``background + alpha * (colour - background)``. Colours are voted on by
the *core* of the foreground (one pixel away from every edge), because a blurred edge of red on white looks pink. Cores
of different colours are different objects, even where they touch; every other pixel goes to its nearest core.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from stage_ray.world.scene import BACKGROUNDS, COLORS

COLOR_NAMES: tuple[str, ...] = tuple(COLORS)
PALETTE = np.asarray(list(COLORS.values()), np.float32)  # [8, 3], 0..255

PALE = 190  # a pixel may be background when every channel is above this
FOREGROUND_ALPHA = 0.45  # share of a colour above which a pixel is foreground
MASK_ALPHA = 0.5  # share of its object's colour above which a pixel is inside the mask
MIN_CORE = 16  # pixels; the smallest true core (a 16-pixel cross) has about 75
REACH = 3.0  # pixels from a core that still belong to its object
SPECKLE_ALPHA = 0.1  # shares below this are the background's noise

# Connectivity inside one plane of a stack: neighbours left, right, up and down; nothing across planes.
_PLANE = np.zeros((3, 3, 3), bool)
_PLANE[1] = ndimage.generate_binary_structure(2, 1)
_PLANES = np.zeros((3, 3, 3, 3), bool)
_PLANES[1] = _PLANE


@dataclass(frozen=True, slots=True)
class Segment:
    """One single-coloured region of one picture.

    Attributes:
        image: index of its picture in the batch.
        color: a name of ``scene.COLORS``.
        purity: 0..1, share of its inner pixels that look like this colour rather than another.
        alpha: float32 [H, W], share of the object's colour in each pixel, 0 away from the object.
        mask: bool [H, W], where ``alpha`` is at least one half.
        box: (x0, y0, x1, y1) of the mask in pixels.
    """

    image: int
    color: str
    purity: float
    alpha: np.ndarray
    mask: np.ndarray
    box: tuple[float, float, float, float]


def segment(images: np.ndarray) -> list[Segment]:
    """All coloured regions of a batch: uint8 [B, H, W, 3] -> segments, ordered by picture."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; a detector takes uint8 [B, H, W, 3]")
    pixels = images.astype(np.float32)
    background = np.stack([_background(image) for image in pixels]) if len(pixels) else np.zeros((0, 3), np.float32)
    offset = pixels - background[:, None, None]  # [B, H, W, 3]
    direction = PALETTE - background[:, None]  # [B, 8, 3]
    nearest = _nearest_color(pixels)
    steps = direction[np.arange(len(pixels))[:, None, None], nearest]  # [B, H, W, 3]
    foreground = (offset * steps).sum(-1) > FOREGROUND_ALPHA * (steps * steps).sum(-1)
    cores, colors = _cores(foreground, nearest)
    segments = []
    for index, (labels, found) in enumerate(zip(cores, colors, strict=True)):
        if found:
            segments += _grow(index, offset[index], direction[index], nearest[index], labels, found)
    return segments


def _background(pixels: np.ndarray) -> np.ndarray:
    """Median of the pale pixels [3]; white where a picture has hardly any."""
    pale = pixels[pixels.min(-1) > PALE]
    if len(pale) < 0.05 * pixels.shape[0] * pixels.shape[1]:
        return np.asarray(BACKGROUNDS["white"], np.float32)
    return np.asarray(np.median(pale, axis=0), np.float32)


def _nearest_color(pixels: np.ndarray) -> np.ndarray:
    """Index into COLOR_NAMES of each pixel's nearest palette colour, int64 [B, H, W]."""
    # |p - c|^2 = |p|^2 - 2 p.c + |c|^2, and the first term does not matter for the minimum.
    distance = (PALETTE * PALETTE).sum(-1) - 2.0 * (pixels @ PALETTE.T)
    return np.asarray(distance.argmin(-1))


def _cores(foreground: np.ndarray, nearest: np.ndarray) -> tuple[np.ndarray, list[list[tuple[int, int]]]]:
    """Label the single-coloured cores.

    Returns:
        labels int32 [B, H, W], 0 outside cores; and per picture its (label, colour index) pairs.
    """
    inner = ndimage.binary_erosion(foreground, _PLANE)
    votes = np.zeros((len(COLOR_NAMES), *foreground.shape), np.float32)
    for color in range(len(COLOR_NAMES)):
        present = inner & (nearest == color)
        if present.any():
            votes[color] = ndimage.uniform_filter(present.astype(np.float32), size=(0, 3, 3))
    winner = votes.argmax(0)  # the majority of the 3 x 3 inner neighbours: single odd pixels do not split an object
    layers = inner & (winner == np.arange(len(COLOR_NAMES))[:, None, None, None])  # [8, B, H, W]
    labels, count = ndimage.label(layers, _PLANES)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    found: list[list[tuple[int, int]]] = [[] for _ in foreground]
    kept = np.zeros(count + 1, np.int32)
    for label, place in enumerate(ndimage.find_objects(labels), start=1):
        if sizes[label] >= MIN_CORE and place is not None:
            kept[label] = label
            found[place[1].start].append((label, place[0].start))
    return kept[labels].max(axis=0), found


def _grow(
    image: int,
    offset: np.ndarray,
    direction: np.ndarray,
    nearest: np.ndarray,
    labels: np.ndarray,
    found: list[tuple[int, int]],
) -> list[Segment]:
    """Give every pixel near a core to its nearest core, and measure each object's colour share there."""
    distance, (rows, columns) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    owner = np.where(distance <= REACH, labels[rows, columns], 0)
    segments = []
    for label, color in found:
        step = direction[color]
        alpha = np.where(owner == label, offset @ step / float(step @ step), 0.0)
        alpha = np.clip(np.where(alpha < SPECKLE_ALPHA, 0.0, alpha), 0.0, 1.0).astype(np.float32)
        mask = alpha >= MASK_ALPHA
        if not mask.any():
            continue
        core = labels == label
        purity = float((nearest[core] == color).mean())
        segments.append(Segment(image, COLOR_NAMES[color], purity, alpha, mask, _box(mask)))
    return segments


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
