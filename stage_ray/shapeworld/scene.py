"""What a ShapeWorld picture is made of: five shapes, eight colours, pale backgrounds.

Shapes and colours were chosen to stay apart after the 64-token tokenizer has blurred them: every stroke is at least
five pixels wide, every colour stands out from every (pale) background, and objects keep a gap of five pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 64  # pixels, both sides
MIN_GAP = 5.0  # pixels between the bounding boxes of two objects
MIN_BORDER = 2.0  # pixels between an object and the picture's edge

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
    "grey": (226, 226, 228),
    "cream": (248, 242, 228),
    "sky": (224, 237, 248),
    "mint": (226, 243, 231),
}

# Diameters in pixels by the number of objects: the more objects, the smaller, and never below 16.
SIZES_BY_COUNT: dict[int, tuple[float, float]] = {1: (22.0, 34.0), 2: (19.0, 27.0), 3: (17.0, 22.0), 4: (16.0, 20.0)}
LATTICE = 4.0  # pixels: half a token's side
LATTICE_SIZES: dict[int, tuple[float, ...]] = {1: (24.0, 32.0), 2: (20.0, 24.0), 3: (16.0, 20.0), 4: (16.0, 20.0)}

Square = tuple[float, float, float]  # cx, cy, size in pixels


@dataclass(frozen=True, slots=True)
class Shape:
    """One object. `cx`, `cy` (pixels, x right, y down) are the centre of its `size` x `size` pixel bounding square.

    Example:
        >>> Shape("circle", "red", cx=20.0, cy=32.0, size=18.0).box
        (11.0, 23.0, 29.0, 41.0)
    """

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
    """Whether two squares keep `gap` pixels between them."""
    reach = (a[2] + b[2]) / 2 + gap
    return abs(a[0] - b[0]) >= reach or abs(a[1] - b[1]) >= reach


def place_squares(sizes: Sequence[float], rng: np.random.Generator, *, lattice: bool = False) -> list[Square]:
    """Random places for squares of these sizes (pixels) that keep MIN_GAP and MIN_BORDER.

    With `lattice`, centres are multiples of LATTICE. Starts over when the first squares leave no room for the rest.
    """
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
            # The first of the twenty that keeps its distance from all placed before.
            place = next((one for one in candidates if all(boxes_apart(one, other) for other in placed)), None)
            if place is None:
                break
            placed.append(place)
        else:  # all of them have found a place
            return placed
    raise ValueError(f"squares of {[round(size, 1) for size in sizes]} pixels do not fit a {IMAGE_SIZE}-pixel picture")


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of 1 to 4 random objects, of any composition: for training the tokenizer and the detector."""
    count = int(rng.integers(1, 5))
    kinds, colors = rng.choice(SHAPES, size=count).tolist(), rng.choice(list(COLORS), size=count).tolist()
    places = place_squares(rng.uniform(*SIZES_BY_COUNT[count], size=count).tolist(), rng)
    shapes = tuple(Shape(kind, color, *place) for kind, color, place in zip(kinds, colors, places, strict=True))
    return Scene(shapes, background=random_background(rng), seed=int(rng.integers(2**31)))


def random_background(rng: np.random.Generator) -> str:
    """One of BACKGROUNDS, uniformly."""
    return str(rng.choice(list(BACKGROUNDS)))
