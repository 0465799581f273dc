"""What a detector is, for GenEval and every other object-level scorer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Detection:
    """One object in one image.

    Attributes:
        label: class name as prompts use it.
        confidence: 0..1, of the class.
        box: (x1, y1, x2, y2) in pixels.
        color: colour name as prompts use it, or None where it is unclear.
        color_confidence: 0..1.
        mask: bool [H, W] or None where the detector has none.
    """

    label: str
    confidence: float
    box: tuple[float, float, float, float]
    color: str | None = None
    color_confidence: float = 0.0
    mask: np.ndarray | None = None


class Detector(Protocol):
    """Finds objects. Named in a config by the dotted path of its class, whose arguments are ``detector_options``.

    Where the class (or, once built, the object) has ``labels`` or ``colors``, the words that it knows, prompts that ask
    for others are refused before a run and never count as a failure of the model. It may have a class method
    ``check(**options)``, which raises a `ConfigError` before a run for options such as a directory without weights, and
    a method ``backgrounds(images)``, which names that of each image, for the scorer ``binding``.
    """

    def detect(self, images: np.ndarray) -> list[list[Detection]]:
        """Images uint8 [B, H, W, 3] -> per image its detections, most confident first."""
        ...
