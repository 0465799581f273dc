"""Finds ShapeWorld's objects: colour and outline by image processing, the shape by a small network over opacity."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from stage_ray.config.paths import resolve_path
from stage_ray.rewards.detection import Detection
from stage_ray.shapeworld.scene import COLORS, SHAPES
from stage_ray.shapeworld.segmentation import Segment, backgrounds, segment

ASSETS = "package:stage_ray/shapeworld/assets/detector"
WEIGHTS_FILE = "model.safetensors"
MIN_CONFIDENCE = 0.05  # less sure detections are not reported at all
WHOLE_PROBABILITY = 0.5  # of a shape, above which a region of several colours is read as one object
BATCH_IMAGES = 64  # bounds the memory of segmentation
CROP_SIZE = 24  # pixels, both sides
CROP_MARGIN = 1.25  # side of the cropped square over the longer side of the segment's box
CLASSES: tuple[str, ...] = (*SHAPES, "none")  # "none": a coloured region that is no shape of this world
NONE = len(SHAPES)


class ShapeDetector:
    """Finds ShapeWorld's objects in pictures, drawn or generated. Deterministic; runs on the CPU.

    The confidence of an object is the classifier's probability of its shape times the segment's `soundness`.
    """

    labels, colors = SHAPES, tuple(COLORS)
    backgrounds = staticmethod(backgrounds)

    def __init__(self, assets: str | Path = ASSETS) -> None:
        """Load the classifier from a directory or a ``package:`` location."""
        self._classifier = build_classifier().eval()
        self._classifier.load_state_dict(load_file(resolve_path(str(assets)) / WEIGHTS_FILE))

    @torch.inference_mode()
    def detect(self, images: np.ndarray) -> list[list[Detection]]:
        """Images uint8 [B, H, W, 3] -> per image its detections, most confident first.

        Raises:
            ValueError: the images are not uint8 [B, H, W, 3].
        """
        found: list[list[Detection]] = [[] for _ in images]
        for start in range(0, len(images), BATCH_IMAGES):
            segments = segment(images[start : start + BATCH_IMAGES])
            probabilities = self._classifier(crop_segments(segments) - 0.5).softmax(-1)[:, :NONE].numpy()
            sure = probabilities.max(1) >= WHOLE_PROBABILITY
            # Each region is read once: as a whole where that makes a likely shape, else as its parts.
            as_whole = {piece.region for piece, likely in zip(segments, sure, strict=True) if piece.whole and likely}
            for piece, shapes in zip(segments, probabilities, strict=True):
                best = int(shapes.argmax())
                confidence = float(shapes[best]) * soundness(piece)
                if piece.whole == (piece.region in as_whole) and confidence >= MIN_CONFIDENCE:
                    one = Detection(SHAPES[best], confidence, piece.box, piece.color, piece.purity, piece.mask)
                    found[start + piece.image].append(one)
        return [sorted(detections, key=lambda one: -one.confidence) for detections in found]


def soundness(piece: Segment) -> float:
    """How much a segment looks like one painted object, no smear: 0..1, less where tiny, of mixed colour, or pale."""
    side = min(piece.box[2] - piece.box[0], piece.box[3] - piece.box[1])
    opacity = float(piece.alpha[piece.mask].mean())
    factors = [
        (side - 6.0) / 6.0,  # pixels: from 0 at 6 to 1 at 12
        (piece.purity - 0.3) / 0.3,
        (62.0 - piece.off_color) / 30.0,  # grey levels: from 0 at 62 to 1 at 32
        (opacity - 0.6) / 0.25,
    ]
    return float(np.prod(np.clip(factors, 0.0, 1.0)))


def build_classifier() -> nn.Sequential:
    """The untrained network that names the shape of one segment, 24 thousand parameters.

    Crops float32 [K, 1, 24, 24] in -0.5..0.5 -> logits [K, 6] over CLASSES.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU()]
    head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 9, 32), nn.ReLU(), nn.Linear(32, len(CLASSES)))
    return nn.Sequential(OrderedDict(features=nn.Sequential(*layers), head=head))


def crop_segments(segments: Sequence[Segment]) -> Tensor:
    """Cut a square around each segment's box out of its alpha, at one scale: float32 [K, 1, 24, 24] in 0..1."""
    if not segments:
        return torch.zeros(0, 1, CROP_SIZE, CROP_SIZE)
    alpha = torch.from_numpy(np.stack([segment.alpha for segment in segments]))[:, None]
    boxes = torch.tensor([segment.box for segment in segments])
    extent = torch.tensor([alpha.shape[-1], alpha.shape[-2]], dtype=torch.float32)  # width, height
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    side = CROP_MARGIN * (boxes[:, 2:] - boxes[:, :2]).amax(-1, keepdim=True)
    # affine_grid's coordinates run from -1 to 1 over the whole picture.
    theta = torch.cat([torch.diag_embed(side / extent), (2 * centre / extent - 1)[..., None]], dim=-1)
    grid = F.affine_grid(theta, [len(segments), 1, CROP_SIZE, CROP_SIZE], align_corners=False)
    return F.grid_sample(alpha, grid, align_corners=False)
