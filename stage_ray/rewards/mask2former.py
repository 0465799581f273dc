"""GenEval's eyes on photographs: Mask2Former finds COCO's objects, CLIP names their colours.

As GenEval (arXiv 2310.11513) runs them, with the checkpoints of transformers in place of mmdet's. Agreement with the
official detector has not been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor
from transformers import CLIPModel, Mask2FormerForUniversalSegmentation

from stage_ray.errors import ConfigError
from stage_ray.rewards.clip import BatchSize, Towers, processors
from stage_ray.rewards.coco import COLORS, OBJECTS, SYNONYMS
from stage_ray.rewards.detection import Detection
from stage_ray.rewards.models import Dtype, check_model, load_image_processor, load_model

SIZE = {"shortest_edge": 800, "longest_edge": 1333}  # mmdet's, whatever the checkpoint's processor says
DETECTIONS = 100  # most of one image, pairs of query and class
BACKGROUND = "#999"  # of a crop, where the object is not
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
MASK2FORMER, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"


class Mask2FormerDetector:
    """Instances of COCO's 80 classes under GenEval's names, overlaps kept, no suppression, with colours.

    Check the licence of the published Mask2Former weights before commercial use.
    """

    labels = OBJECTS
    colors = COLORS

    def __init__(
        self,
        path: str = MASK2FORMER,
        clip: str = CLIP,
        min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.3,
        batch_size: BatchSize = 8,
        dtype: Dtype = "float32",
        device: str | None = None,
    ) -> None:
        """Load both models.

        Args:
            path: a Mask2Former trained on COCO's instances: a directory or hub id.
            clip: the CLIP that names colours.
            min_confidence: detections at or below it are left out; GenEval looks at none below 0.3.
            batch_size, dtype, device: as of `ClipReward`, for both.
        """
        self._model, location = load_model(Mask2FormerForUniversalSegmentation, path=path, dtype=dtype, device=device)
        self._names = class_names(self._model.config.id2label, path)
        self._processor, self._batch_size = load_image_processor(location), batch_size
        self._min_confidence = min_confidence
        colors, where = load_model(CLIPModel, path=clip, dtype=dtype, device=device)
        self._towers = Towers(colors, *processors(where, None), batch_size)
        self._color_rows: dict[str, Tensor] = {}  # class -> float32 [10, P], unit vectors

    @classmethod
    def check(cls, path: str = MASK2FORMER, clip: str = CLIP, **options: Any) -> None:
        """Check checkpoints that lie here; see `Detector`."""
        location = check_model(Mask2FormerForUniversalSegmentation, path=path, tensors=False)
        if location is not None:
            load_image_processor(location)
            class_names(Mask2FormerForUniversalSegmentation.config_class.from_pretrained(location).id2label, path)
        if (location := check_model(CLIPModel, path=clip)) is not None:
            processors(location, None)

    def detect(self, images: np.ndarray) -> list[list[Detection]]:
        """Images uint8 [B, H, W, 3] -> per image its detections, most confident first, with masks and colours."""
        found: list[list[Detection]] = []
        for start in range(0, len(images), self._batch_size):
            found += self._instances(images[start : start + self._batch_size])
        return self._with_colors(images, found)

    @torch.inference_mode()
    def _instances(self, images: np.ndarray) -> list[list[Detection]]:
        inputs = self._processor(list(images), return_tensors="pt", size=SIZE, do_resize=True)
        pixels = inputs["pixel_values"].to(self._model.device, self._model.dtype)
        mask = inputs["pixel_mask"].to(self._model.device)
        output = self._model(pixels, pixel_mask=mask)
        frame = Frame(tuple(pixels.shape[2:]), tuple(int(mask[0].any(dim).sum()) for dim in (1, 0)), images.shape[1:3])
        rows = zip(output.class_queries_logits.float(), output.masks_queries_logits.float(), strict=True)
        return [instances(classes, masks, frame, self._names, self._min_confidence) for classes, masks in rows]

    def _with_colors(self, images: np.ndarray, found: list[list[Detection]]) -> list[list[Detection]]:
        """The same detections with GenEval's colours: CLIP's most similar one of ten to each object's crop."""
        crops = [crop(image, one) for image, seen in zip(images, found, strict=True) for one in seen]
        if not crops:
            return found
        rows = iter(torch.cat([self._towers.images(each[None]) for each in crops]))  # each of its own size
        return [[self._colored(one, next(rows)) for one in seen] for seen in found]

    def _colored(self, one: Detection, row: Tensor) -> Detection:
        if one.label not in self._color_rows:
            texts = [template.format(color=color, name=one.label) for color in COLORS for template in TEMPLATES]
            vectors = self._towers.texts(texts).view(len(COLORS), len(TEMPLATES), -1)
            self._color_rows[one.label] = F.normalize(vectors.mean(1), dim=-1)
        shares = (self._towers.logit_scale * self._color_rows[one.label] @ row).softmax(-1)
        best = int(shares.argmax())
        return replace(one, color=COLORS[best], color_confidence=float(shares[best]))


@dataclass(frozen=True, slots=True)
class Frame:
    """Heights and widths in pixels: of the model's input with its padding, of the picture in it, of the image."""

    padded: tuple[int, ...]
    resized: tuple[int, ...]
    image: tuple[int, ...]


def instances(
    classes: Tensor, masks: Tensor, frame: Frame, names: Sequence[str], min_confidence: float
) -> list[Detection]:
    """Detections of one image from its queries, as mmdet's ``instance_postprocess``: most confident first.

    A confidence is the probability of the class times the mean probability of the mask's pixels. A mask is where the
    logits, brought to the image's size, are above 0; the box is its extent.

    Args:
        classes: float32 [Q, C + 1], logits, the last "no object".
        masks: float32 [Q, h, w], logits over the padded input.
    """
    shares = classes.softmax(-1)[:, :-1]
    best = shares.flatten().topk(min(DETECTIONS, shares.numel()))
    found = []
    for share, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if share <= min_confidence:
            break  # a mask can only lower it
        query, label = divmod(index, shares.shape[1])
        logits = _resized(masks[query], frame.padded)[: frame.resized[0], : frame.resized[1]]
        logits = _resized(logits, frame.image)
        mask = logits > 0
        confidence = share * float(logits.sigmoid()[mask].sum() / (mask.sum() + 1e-6))
        if confidence > min_confidence:
            seen = mask.cpu().numpy()
            rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            found.append(Detection(names[label], confidence, box, mask=seen))
    return sorted(found, key=lambda one: -one.confidence)


def class_names(id2label: dict[int, str], path: str) -> list[str]:
    """GenEval's name of each class of a checkpoint.

    Raises:
        ConfigError: the checkpoint has other classes than COCO's.
    """
    names = [SYNONYMS.get(name, name) for _, name in sorted((int(index), name) for index, name in id2label.items())]
    if unknown := [name for name in names if name not in OBJECTS]:
        raise ConfigError(f"path {path!r} knows a class {unknown[0]!r}: take a Mask2Former of COCO's 80 classes")
    return names


def crop(image: np.ndarray, one: Detection) -> np.ndarray:
    """An object on grey, uint8 [h, w, 3], cut out by its box."""
    picture = Image.fromarray(image)
    if one.mask is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size, BACKGROUND), Image.fromarray(one.mask))
    return np.asarray(picture.crop(one.box))


def _resized(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits [h, w] at another size, bilinear as mmdet's."""
    return F.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)[0, 0]
