"""Cuts a ShapeWorld picture into single-coloured objects, by plain image processing; no learning here.

A pixel is ``background + alpha * (colour - background)``, of a known palette. Colours are voted on by the *core* of the
foreground (one pixel away from every edge), because a blurred edge of red on white looks pink; every other pixel goes
to its nearest core. Where cores of different colours touch, they may be two objects, or one that the tokenizer gave a
corner of another colour: both readings are returned, and `ShapeDetector` lets the shape decide.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from stage_ray.shapeworld.scene import BACKGROUNDS, COLORS

COLOR_NAMES: tuple[str, ...] = tuple(COLORS)
PALETTE = np.asarray(list(COLORS.values()), np.float32)  # [8, 3], 0..255

PALE = 190  # a pixel may be background when every channel is above this
FOREGROUND_ALPHA = 0.45  # share of a colour above which a pixel is foreground
MASK_ALPHA = 0.5  # share of its object's colour above which a pixel is inside the mask
MIN_CORE = 16  # pixels; the smallest true core (a 16-pixel cross) has about 75
REACH = 3.0  # pixels from a core that still belong to its object
SPECKLE_ALPHA = 0.1  # shares below this are the background's noise

# Connectivity inside one plane of a stack: neighbours left, right, up and down; nothing across planes.
_PLANE = np.pad(ndimage.generate_binary_structure(2, 1)[None], ((1, 1), (0, 0), (0, 0)))
_PLANES = np.pad(_PLANE[None], ((1, 1), (0, 0), (0, 0), (0, 0)))


@dataclass(frozen=True)
class Segment:
    """One single-coloured region of one picture."""

    image: int  # index of its picture in the batch
    color: str  # a name of `scene.COLORS`
    purity: float  # 0..1, share of its inner pixels that look like this colour rather than another
    off_color: float  # median distance of its inner pixels from the palette, in grey levels (0..441)
    region: int  # number of the connected foreground that it lies in, unique in the batch
    core: int  # number of its inner pixels
    alpha: np.ndarray  # float32 [H, W], share of the object's colour in each pixel, 0 away from the object
    whole: bool = False  # whether this is the reading that takes all cores of a region for one object

    @cached_property
    def mask(self) -> np.ndarray:
        """Where ``alpha`` is at least one half, bool [H, W]."""
        return self.alpha >= MASK_ALPHA

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the mask in pixels."""
        rows, columns = ndimage.find_objects(self.mask.astype(np.int8))[0]
        return (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))


def segment(images: np.ndarray) -> list[Segment]:
    """All coloured regions of a batch: uint8 [B, H, W, 3] -> segments, ordered by picture."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; a detector takes uint8 [B, H, W, 3]")
    pixels = images.astype(np.float32)
    background = np.asarray([_background(image) for image in pixels], np.float32).reshape(-1, 3)
    offset = pixels - background[:, None, None]  # [B, H, W, 3]
    direction = PALETTE - background[:, None]  # [B, 8, 3]
    squares = (pixels * pixels).sum(-1)[..., None] - 2.0 * (pixels @ PALETTE.T) + (PALETTE * PALETTE).sum(-1)
    nearest = squares.argmin(-1)  # index into COLOR_NAMES of each pixel's nearest palette colour, [B, H, W]
    off_color = np.sqrt(np.maximum(squares.min(-1), 0.0))
    steps = direction[np.arange(len(pixels))[:, None, None], nearest]  # [B, H, W, 3]
    foreground = (offset * steps).sum(-1) > FOREGROUND_ALPHA * (steps * steps).sum(-1)
    regions, _ = ndimage.label(foreground, _PLANE)
    segments: list[Segment] = []
    for index, (labels, found) in enumerate(zip(*_cores(foreground, nearest), strict=True)):
        if not found:
            continue
        # Every pixel near a core goes to its nearest core.
        distance, (rows, columns) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
        owner = np.where(distance <= REACH, labels[rows, columns], 0)
        parts = []
        for label, color in found:
            core, step = labels == label, direction[index, color]
            alpha = np.where(owner == label, offset[index] @ step / float(step @ step), 0.0)
            part = Segment(
                image=index,
                color=COLOR_NAMES[color],
                purity=float((nearest[index][core] == color).mean()),
                off_color=float(np.median(off_color[index][core])),
                region=int(regions[index][core][0]),
                core=int(core.sum()),
                alpha=np.clip(np.where(alpha < SPECKLE_ALPHA, 0.0, alpha), 0.0, 1.0).astype(np.float32),
            )
            parts += [part] if part.mask.any() else []
        segments += parts + _wholes(parts)
    return segments


def backgrounds(images: np.ndarray) -> list[str]:
    """The name of each picture's paper, the nearest of `scene.BACKGROUNDS`: uint8 [B, H, W, 3] -> B names."""
    papers = np.asarray([_background(image) for image in images.astype(np.float32)]).reshape(-1, 1, 3)
    nearest = np.square(papers - list(BACKGROUNDS.values())).sum(-1).argmin(-1)
    return [tuple(BACKGROUNDS)[index] for index in nearest]


def _background(pixels: np.ndarray) -> np.ndarray:
    """Median of the pale pixels [3]; white where a picture has hardly any."""
    pale = pixels[pixels.min(-1) > PALE]
    enough = len(pale) >= 0.05 * pixels.shape[0] * pixels.shape[1]
    return np.asarray(np.median(pale, axis=0) if enough else BACKGROUNDS["white"])


def _cores(foreground: np.ndarray, nearest: np.ndarray) -> tuple[np.ndarray, list[list[tuple[int, int]]]]:
    """Label the single-coloured cores, int32 [B, H, W], 0 outside; and per picture its (label, colour index) pairs."""
    inner = ndimage.binary_erosion(foreground, _PLANE)
    colors = np.arange(len(COLOR_NAMES))[:, None, None, None]
    votes = ndimage.uniform_filter((inner & (nearest == colors)).astype(np.float32), size=(0, 0, 3, 3))  # [8, B, H, W]
    winner = votes.argmax(0)  # the majority of the 3 x 3 inner neighbours: single odd pixels do not split an object
    layers = inner & (winner == colors)
    labels, count = ndimage.label(layers, _PLANES)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    found: list[list[tuple[int, int]]] = [[] for _ in foreground]
    kept = np.zeros(count + 1, np.int32)
    for label, place in enumerate(ndimage.find_objects(labels), start=1):
        if sizes[label] >= MIN_CORE:
            kept[label] = label
            found[place[1].start].append((label, place[0].start))
    return kept[labels].max(axis=0), found


def _wholes(parts: list[Segment]) -> list[Segment]:
    """The other reading of each region with several cores: one object, in the colour of most of its core pixels."""
    wholes = []
    for region in dict.fromkeys(part.region for part in parts):
        members = [part for part in parts if part.region == region]
        if len(members) < 2:
            continue
        total = sum(part.core for part in members)
        shares: dict[str, float] = defaultdict(float)  # colour -> share of the region's core pixels
        for part in members:
            shares[part.color] += part.purity * part.core / total
        color, purity = max(shares.items(), key=lambda share: share[1])
        off_color = sum(part.off_color * part.core for part in members) / total
        alpha = np.sum([part.alpha for part in members], axis=0)  # each pixel has one owner, so alphas never overlap
        wholes.append(Segment(members[0].image, color, purity, off_color, region, total, alpha, whole=True))
    return wholes
