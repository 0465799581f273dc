"""CLIP as a reward: cosine similarity of picture and prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

from stage_ray.errors import ConfigError
from stage_ray.pretrained import check_directory, check_finite, check_tensors, local_checkpoint, located
from stage_ray.records import Prompt
from stage_ray.rewards.base import RewardOutput


class ClipReward:
    """Cosine similarity of any transformers CLIP checkpoint (Radford et al., arXiv 2103.00020), times ``scale``.

    Details of an image: ``cosine``, in -1..1.
    """

    def __init__(
        self,
        path: str,
        scale: float = 1.0,
        batch_size: Annotated[int, Field(ge=1)] = 64,
        device: str | None = None,
    ) -> None:
        """Load the checkpoint; no code that comes with it is run.

        Args:
            path: a directory, ``package:MODULE/DIR``, or a hub id, ``OWNER/NAME[@REVISION]``.
            scale: factor on the cosine; CLIPScore (arXiv 2104.08718) uses 2.5.
            batch_size: images in one forward pass.
            device: a torch device; a GPU where this process sees one, by default.
        """
        location = local_checkpoint(path, "clip", "path")
        self._tokenizer, self._processor = _processors(location)
        try:
            self._model, report = CLIPModel.from_pretrained(location, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"path {path!r} is not a CLIP checkpoint: {' '.join(str(error).split())}") from error
        if missing := sorted(report["missing_keys"]):
            raise ConfigError(f"path: {location} lacks {len(missing)} tensors, the first is {missing[0]}")
        for name, parameter in self._model.named_parameters():
            check_finite(name, parameter, location, "path")
        self._model.eval()
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model.to(self._device)
        self._scale, self._batch_size = scale, batch_size

    @classmethod
    def check(cls, prompts: Sequence[Prompt], path: str, **options: Any) -> Iterator[tuple[Prompt, str]]:
        """Check a local checkpoint down to the shapes of its tensors; see `Reward`. It judges every prompt."""
        location = located(path)
        if location is not None:
            check_directory(location, "clip", "path")
            _processors(location)
            with torch.device("meta"):  # shapes alone, no memory
                expected = CLIPModel(CLIPConfig.from_pretrained(location)).state_dict()
            check_tensors(location, {name: tensor.shape for name, tensor in expected.items()}, "path")
        return iter(())

    @torch.inference_mode()
    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt's text (cut at CLIP's context length).

        The features are the images' unit vectors.
        """
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))  # a group shares its prompt: encode it once
        size = self._batch_size
        text_rows = torch.cat([self._encode_texts(texts[i : i + size]) for i in range(0, len(texts), size)])
        image_rows = torch.cat([self._encode_images(images[i : i + size]) for i in range(0, len(images), size)])
        wanted = torch.tensor([texts.index(prompt.text) for prompt in prompts], device=self._device)
        cosine = (image_rows * text_rows[wanted]).sum(-1).float().cpu().numpy()  # [B], of unit vectors
        scores = np.asarray(self._scale * cosine, np.float32)
        details = tuple({"cosine": float(value)} for value in cosine)
        return RewardOutput(scores, np.isfinite(scores), details, image_rows.float().cpu().numpy())

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [len(texts), P]."""
        length = self._model.config.text_config.max_position_embeddings  # CLIP's context length
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(self._device)
        output = self._model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
        return F.normalize(output.pooler_output, dim=-1)

    def _encode_images(self, images: np.ndarray) -> Tensor:
        """Unit vectors [len(images), P]."""
        pictures = [Image.fromarray(image) for image in images]
        pixels = self._processor(pictures, return_tensors="pt")["pixel_values"].to(self._device, self._model.dtype)
        return F.normalize(self._model.get_image_features(pixels).pooler_output, dim=-1)


def _processors(location: Path) -> tuple[Any, Any]:
    """Tokenizer and image processor of a checkpoint.

    Raises:
        ConfigError: one of them is missing or damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
        return tokenizer, AutoImageProcessor.from_pretrained(location, backend="pil")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"path: {location} is not a CLIP checkpoint: {' '.join(str(error).split())}") from error
