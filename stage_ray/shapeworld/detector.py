"""The eyes of ShapeWorld: objects with class, colour, box, mask and a confidence that is low for mush."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from stage_ray.config.paths import resolve_path
from stage_ray.rewards.detection import Detection
from stage_ray.shapeworld.detector_classifier import NONE, crop_segments, load_classifier
from stage_ray.shapeworld.detector_segmentation import Segment, segment
from stage_ray.shapeworld.scene import SHAPES

ASSETS = "package:stage_ray/shapeworld/assets/detector"
MIN_CONFIDENCE = 0.05  # less sure detections are not reported at all
WHOLE_PROBABILITY = 0.5  # of a shape, above which a region of several colours is read as one object
BATCH_IMAGES = 64  # bounds the memory of segmentation


class ShapeDetector:
    """Finds ShapeWorld's objects in pictures, drawn or generated. Deterministic; runs on the CPU.

    Colour and outline come from image processing (`detector_segmentation`), the shape from a small network
    (`detector_classifier`). The confidence of an object is the network's probability of its shape, lowered where the
    segment is tiny, of mixed colour, or pale.

    Example:
        >>> from stage_ray.shapeworld.render import render
        >>> from stage_ray.shapeworld.scene import Scene, Shape
        >>> picture = render(Scene((Shape("ring", "red", cx=32.0, cy=32.0, size=30.0),)))
        >>> [(found.label, found.color) for found in ShapeDetector().detect(picture[None])[0]]
        [('ring', 'red')]
    """

    def __init__(self, assets: str | Path = ASSETS) -> None:
        """Load the classifier from a directory or a ``package:`` location."""
        self._classifier = load_classifier(assets if isinstance(assets, Path) else resolve_path(assets))

    def detect(self, images: np.ndarray) -> list[list[Detection]]:
        """Images uint8 [B, H, W, 3] -> per image its detections, most confident first.

        Raises:
            ValueError: the images are not uint8 [B, H, W, 3].
        """
        found: list[list[Detection]] = []
        for start in range(0, len(images), BATCH_IMAGES):
            batch = images[start : start + BATCH_IMAGES]
            segments = segment(batch)
            probabilities = self._classifier.probabilities(crop_segments(segments))
            per_image: list[list[Detection]] = [[] for _ in batch]
            for piece, chances in _readings(segments, probabilities):
                detection = _detection(piece, chances)
                if detection.confidence >= MIN_CONFIDENCE:
                    per_image[piece.image].append(detection)
            found += [sorted(detections, key=lambda one: -one.confidence) for detections in per_image]
        return found


def _readings(segments: Sequence[Segment], probabilities: np.ndarray) -> Iterator[tuple[Segment, np.ndarray]]:
    """Of each region one reading: as a whole where that makes a likely shape, else its parts."""
    as_whole = {
        piece.region
        for piece, chances in zip(segments, probabilities, strict=True)
        if piece.whole and chances[:NONE].max() >= WHOLE_PROBABILITY
    }
    for piece, chances in zip(segments, probabilities, strict=True):
        if piece.whole == (piece.region in as_whole):
            yield piece, chances


def _detection(piece: Segment, chances: np.ndarray) -> Detection:
    best = int(chances[:NONE].argmax())
    return Detection(
        label=SHAPES[best],
        confidence=float(chances[best]) * soundness(piece),
        box=piece.box,
        color=piece.color,
        color_confidence=piece.purity,
        mask=piece.mask,
    )


def soundness(piece: Segment) -> float:
    """How much a segment looks like one painted object rather than a smear: 0..1, and 1 for every rendered object.

    Falls from 1 to 0 as its shorter side goes from 12 to 6 pixels, as the share of pixels of its own colour goes from
    0.6 to 0.3, as their distance from the palette goes from 65 to 100 grey levels, and as the mean opacity inside its
    mask goes from 0.8 to 0.55.
    """
    side = min(piece.box[2] - piece.box[0], piece.box[3] - piece.box[1])
    opacity = float(piece.alpha[piece.mask].mean())
    factors = (
        (side - 6.0) / 6.0,
        (piece.purity - 0.3) / 0.3,
        (100.0 - piece.off_color) / 35.0,
        (opacity - 0.55) / 0.25,
    )
    return float(np.prod(np.clip(factors, 0.0, 1.0)))
