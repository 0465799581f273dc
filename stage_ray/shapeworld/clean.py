"""Whether a picture shows whole objects on clean paper and nothing else, whatever it was asked to show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from stage_ray.records import Prompt
from stage_ray.rewards.base import RewardOutput
from stage_ray.shapeworld.detector import ShapeDetector

CONFIDENCE = 0.5  # as in the ShapeWorld suite: a less sure detection is no object
PALE = 190  # every channel of paper is above this
EDGE = 3  # pixels around an object that still belong to it: the tokenizer blurs outlines
SPECK = 12  # pixels; the largest blot that counts as none


class CleanReward:
    """1 where the detector is sure of every blot on the paper that is larger than a speck, and of one at least; else 0.

    A measure (`stage_ray.evaluation.measures.clean`): a policy that was rewarded with it would learn one neat object.
    """

    def __init__(self) -> None:
        """Load the detector that ships."""
        self._detector = ShapeDetector()

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, 64, 64, 3]; the prompts do not matter. ``blot``: pixels of the largest one."""
        blots, objects = [], []
        for image, found in zip(images, self._detector.detect(images), strict=True):
            masks = [one.mask for one in found if one.confidence > CONFIDENCE and one.mask is not None]
            objects.append(len(masks))
            blots.append(largest_blot(image, masks))
        clean = (np.asarray(blots) <= SPECK) & (np.asarray(objects) > 0)
        details = tuple({"blot": blot, "objects": count} for blot, count in zip(blots, objects, strict=True))
        return RewardOutput(clean.astype(np.float32), np.ones(len(images), bool), details)


def largest_blot(image: np.ndarray, masks: Sequence[np.ndarray]) -> int:
    """Pixels of the largest connected region of uint8 [H, W, 3] that is neither paper nor near one of these objects."""
    covered = np.any([np.zeros(image.shape[:2], bool), *masks], axis=0)
    left = (image.min(axis=-1) <= PALE) & ~ndimage.binary_dilation(covered, iterations=EDGE)
    labels, count = ndimage.label(left)
    return int(np.bincount(labels.ravel())[1:].max()) if count else 0
