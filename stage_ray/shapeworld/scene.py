"""What a ShapeWorld picture is made of, five shapes, eight colours and pale backgrounds, and how it is drawn.

All of it stays apart after the 64-token tokenizer has blurred it: strokes and gaps are at least five pixels wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 64  # pixels, both sides
MIN_GAP, MIN_BORDER = 5.0, 2.0  # pixels between the boxes of two objects, and between one and the picture's edge
MIN_STROKE = 5.0  # pixels: arms of the cross, band of the ring
NOISE_SIGMA, TEXTURE_AMPLITUDE = 3.0, 4.0  # grey levels of 255

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (246, 132, 16),
    "yellow": (240, 208, 20),
    "green": (34, 150, 62),
    "blue": (36, 84, 216),
    "purple": (124, 44, 160),
    "pink": (244, 120, 184),
    "black": (24, 24, 28),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (247, 247, 247),
    "grey": (216, 216, 220),
    "cream": (250, 238, 208),
    "sky": (214, 232, 252),
    "mint": (214, 244, 222),
}

# Diameters in pixels by the number of objects: the more objects, the smaller, and never below 16.
SIZES_BY_COUNT: dict[int, tuple[float, float]] = {1: (18.0, 36.0), 2: (16.0, 27.0), 3: (16.0, 24.0), 4: (16.0, 20.0)}
LATTICE = 4.0  # pixels: half a token's side
# On the lattice an object is small or large.
LATTICE_SIZES: dict[int, tuple[float, float]] = {1: (20.0, 32.0), 2: (16.0, 26.0), 3: (16.0, 24.0), 4: (16.0, 20.0)}

Square = tuple[float, float, float]  # cx, cy, size in pixels

_Y, _X = np.indices((IMAGE_SIZE, IMAGE_SIZE), np.float32) + np.float32(0.5)  # centres: pixel i covers [i, i + 1)


@dataclass(frozen=True, slots=True)
class Shape:
    """One object. `cx`, `cy` (pixels, x right, y down) are the centre of its `size` x `size` pixel bounding square."""

    kind: str
    color: str
    cx: float
    cy: float
    size: float

    def __post_init__(self) -> None:
        if self.kind not in SHAPES:
            raise ValueError(f"unknown shape {self.kind!r}; ShapeWorld has {', '.join(SHAPES)}")
        if self.color not in COLORS:
            raise ValueError(f"unknown colour {self.color!r}; ShapeWorld has {', '.join(COLORS)}")

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding square (x0, y0, x1, y1) in pixels, as GenEval's detectors give boxes."""
        half = self.size / 2
        return (self.cx - half, self.cy - half, self.cx + half, self.cy + half)


@dataclass(frozen=True, slots=True)
class Scene:
    """A whole picture. `seed` fixes the background's texture and the pixel noise: equal scenes render equal pixels."""

    shapes: tuple[Shape, ...]
    background: str = "white"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"unknown background {self.background!r}; ShapeWorld has {', '.join(BACKGROUNDS)}")


def boxes_apart(a: Square, b: Square, gap: float = MIN_GAP) -> bool:
    """Whether at least ``gap`` pixels lie between two squares (centre x, centre y, side), along x or along y."""
    reach = (a[2] + b[2]) / 2 + gap
    return abs(a[0] - b[0]) >= reach or abs(a[1] - b[1]) >= reach


def place_squares(sizes: Sequence[float], rng: np.random.Generator, *, lattice: bool = False) -> list[Square]:
    """Random places for squares of these sizes (pixels) that keep MIN_GAP and MIN_BORDER; with `lattice`, centres are
    multiples of LATTICE. Starts over when the first squares leave no room for the rest."""
    for _ in range(1000):
        placed: list[Square] = []
        for size in sizes:
            low, high = MIN_BORDER + size / 2, IMAGE_SIZE - MIN_BORDER - size / 2
            if lattice:
                first, last = math.ceil(low / LATTICE), math.floor(high / LATTICE)
                centres = LATTICE * rng.integers(first, last, size=(20, 2), endpoint=True)
            else:
                centres = rng.uniform(low, high, size=(20, 2))
            candidates = ((float(cx), float(cy), float(size)) for cx, cy in centres)
            free = (one for one in candidates if all(boxes_apart(one, other) for other in placed))
            if (place := next(free, None)) is None:  # none of the twenty keeps its distance from those before
                break
            placed.append(place)
        else:  # all of them have found a place
            return placed
    raise ValueError(f"squares of {[round(size, 1) for size in sizes]} pixels do not fit a {IMAGE_SIZE}-pixel picture")


def on_random_paper(shapes: Sequence[Shape], rng: np.random.Generator, background: str | None = None) -> Scene:
    """The scene of these shapes with a random seed, on a background or on a random one."""
    paper = background or str(rng.choice(list(BACKGROUNDS)))
    return Scene(tuple(shapes), background=paper, seed=int(rng.integers(2**31)))


def random_places(sizes: Sequence[str | None], rng: np.random.Generator, *, lattice: bool = False) -> list[Square]:
    """`place_squares` for one object for each of `sizes`: "small", "large" or, for None, any."""
    low, high = SIZES_BY_COUNT[len(sizes)]
    if lattice:
        small, large = LATTICE_SIZES[len(sizes)]
        sides = [float(rng.choice(LATTICE_SIZES[len(sizes)])) for _ in sizes]
    else:
        fifth = (high - low) / 5
        small, large = low + rng.uniform(0, fifth), high - rng.uniform(0, fifth)
        sides = rng.uniform(low, high, size=len(sizes)).tolist()
    named = {"small": small, "large": large}
    return place_squares(
        [named.get(size or "", side) for size, side in zip(sizes, sides, strict=True)], rng, lattice=lattice
    )


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of 1 to 4 random objects, of any composition."""
    count = int(rng.integers(1, 5))
    kinds, colors = rng.choice(SHAPES, size=count).tolist(), rng.choice(list(COLORS), size=count).tolist()
    places = random_places([None] * count, rng)
    return on_random_paper([Shape(k, c, *place) for k, c, place in zip(kinds, colors, places, strict=True)], rng)


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


def coverage(shape: Shape) -> np.ndarray:
    """How much of each pixel the shape covers: float32 [64, 64] in 0..1."""
    return np.clip(0.5 - _distance(shape), 0.0, 1.0).astype(np.float32)


def render(scene: Scene, *, plain: bool = False) -> np.ndarray:
    """The picture of a scene, uint8 [64, 64, 3], RGB; `plain` leaves out texture and noise."""
    rng = np.random.default_rng(scene.seed)
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUNDS[scene.background], np.float32)
    if not plain:  # three long waves
        low, high = (-0.12, -0.12, 0.0), (0.12, 0.12, 2 * np.pi)
        waves = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
        for kx, ky, phase in rng.uniform(low, high, size=(3, 3)).astype(np.float32):
            waves += np.cos(kx * _X + ky * _Y + phase)
        canvas += (TEXTURE_AMPLITUDE / 3 * waves)[..., None]
    for shape in scene.shapes:
        canvas += coverage(shape)[..., None] * (np.asarray(COLORS[shape.color], np.float32) - canvas)
    if not plain:
        canvas += NOISE_SIGMA * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
