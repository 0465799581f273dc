"""Names the shape of one segment: a small convolutional network that sees 24 x 24 pixels of shape and no colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stage_ray.shapeworld.detector_segmentation import Segment
from stage_ray.shapeworld.scene import SHAPES

CROP_SIZE = 24  # pixels, both sides
CROP_MARGIN = 1.25  # side of the cropped square over the longer side of the segment's box
CLASSES: tuple[str, ...] = (*SHAPES, "none")  # "none": a coloured region that is no shape of this world
NONE = len(SHAPES)
WEIGHTS_FILE = "model.safetensors"


class ShapeClassifier(nn.Module):
    """Three strided convolutions and one hidden layer, 24 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 9, 32), nn.ReLU(), nn.Linear(32, len(CLASSES)))

    def forward(self, crops: Tensor) -> Tensor:
        """Crops float32 [K, 24, 24] in 0..1 -> logits [K, 6] over CLASSES."""
        return self.head(self.features(crops[:, None] - 0.5))

    @torch.inference_mode()
    def probabilities(self, crops: np.ndarray) -> np.ndarray:
        """Crops float32 [K, 24, 24] -> class probabilities float32 [K, 6]; K may be 0."""
        if len(crops) == 0:
            return np.zeros((0, len(CLASSES)), np.float32)
        return np.asarray(self(torch.from_numpy(crops)).softmax(-1).numpy(), np.float32)


def crop_segments(segments: Sequence[Segment]) -> np.ndarray:
    """Cut a square around each segment's box out of its alpha, at one scale: float32 [K, 24, 24] in 0..1."""
    if not segments:
        return np.zeros((0, CROP_SIZE, CROP_SIZE), np.float32)
    alpha = torch.from_numpy(np.stack([segment.alpha for segment in segments]))[:, None]
    boxes = torch.tensor([segment.box for segment in segments])
    height, width = alpha.shape[-2:]
    extent = torch.tensor([width, height], dtype=torch.float32)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    side = CROP_MARGIN * (boxes[:, 2:] - boxes[:, :2]).amax(-1, keepdim=True)
    # affine_grid's coordinates run from -1 to 1 over the whole picture.
    scale, shift = side / extent, 2 * centre / extent - 1
    theta = torch.zeros(len(segments), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale[:, 0], scale[:, 1]
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [len(segments), 1, CROP_SIZE, CROP_SIZE], align_corners=False)
    return np.asarray(F.grid_sample(alpha, grid, align_corners=False)[:, 0].numpy(), np.float32)


def save_classifier(model: ShapeClassifier, directory: Path) -> None:
    """Write the weights as safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"classes": ",".join(CLASSES)})


def load_classifier(directory: Path) -> ShapeClassifier:
    """Read what `save_classifier` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: there are no weights; says how to make them.
        RuntimeError: the weights are of another network.
    """
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"the detector has no weights at {path}; `stage-ray pretrain` makes them")
    model = ShapeClassifier()
    model.load_state_dict(load_file(path))
    return model.eval()
