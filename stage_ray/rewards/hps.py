"""HPS v2.1 (Wu et al., arXiv 2306.09341): human preference, from an open_clip ViT-H-14 tuned on people's rankings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from stage_ray.config.hub import HUB
from stage_ray.errors import ConfigError
from stage_ray.records import Prompt
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.clip import BatchSize, Towers
from stage_ray.rewards.models import Dtype, device_of, fill, load_tokenizer, processor_directory, read_state

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own
PUBLISHED = "hf://xswu/HPSv2/HPS_v2.1_compressed.pt"
ARCHITECTURE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class HpsReward:
    """Cosine of picture and prompt times ``scale``: about 0.2..0.35, as STAGE trained on it; 100 is what tables show.

    Compares pictures of one prompt; versions of HPS are not comparable. Details and features are those of `ClipReward`.
    """

    def __init__(
        self,
        path: str = PUBLISHED,
        processor: str = ARCHITECTURE,
        scale: float = 1.0,
        batch_size: BatchSize = 32,
        dtype: Dtype = "float32",
        device: str | None = None,
    ) -> None:
        """Load the published file (Apache-2.0), read as tensors alone.

        Args:
            path: the ``.pt`` file, here or ``hf://OWNER/NAME/FILE``; or safetensors with open_clip's names.
            processor: a CLIP of the same architecture in transformers' layout; its config and tokenizer are read.
            scale: factor on the cosine.
            batch_size, dtype, device: as of `ClipReward`.
        """
        model = _model(path, processor)
        model = model.eval().to(device_of(device), getattr(torch, dtype))
        tokenizer = load_tokenizer(processor_directory(processor), "processor")
        pixels = partial(longest_side_padded, size=model.config.vision_config.image_size)
        self._towers, self._scale = Towers(model, tokenizer, pixels, batch_size), scale

    @classmethod
    def check(
        cls, prompts: Sequence[Prompt], path: str = PUBLISHED, processor: str = ARCHITECTURE, **options: Any
    ) -> Iterator[tuple[Prompt, str]]:
        """Check files that lie here, down to the shapes of tensors; see `Reward`. It judges every prompt."""
        if not path.startswith(HUB):
            with torch.device("meta"):
                _model(path, processor, check=True)
            load_tokenizer(processor_directory(processor), "processor")
        return iter(())

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt's text (cut at 77 tokens)."""
        return self._towers.score(images, prompts, self._scale)


def longest_side_padded(images: np.ndarray, size: int) -> Tensor:
    """Images, uint8 [B, H, W, 3], as HPS sees them: float32 [B, 3, size, size].

    The longest side is resized to ``size`` (bicubic, antialiased) and the rest is black, by half on each side, as
    hpsv2's ``ResizeMaxSize``.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    height, width = pixels.shape[2:]
    if (scale := size / max(height, width)) != 1:
        inner = (round(height * scale), round(width * scale))
        pixels = F.interpolate(pixels, inner, mode="bicubic", antialias=True)
        down, right = size - inner[0], size - inner[1]
        pixels = F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an open_clip CLIP under the names of transformers' `CLIPModel`; views, nothing is copied."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = re.sub(r"^visual\.", "vision_model.", name) if name.startswith("visual.") else f"text_model.{name}"
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        if name in ("text_model.logit_scale", "text_projection.weight", "visual_projection.weight"):
            found[name.removeprefix("text_model.")] = tensor.T if tensor.ndim == 2 else tensor
        elif "in_proj_" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("in_proj_", f"{part}_proj.")] = rows
        else:
            found[name] = tensor
    return found


RENAMED = (
    (r"transformer\.resblocks\.", "encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.ln_pre\.", ".pre_layrnorm."),  # transformers' own spelling
    (r"\.ln_post\.", ".post_layernorm."),
    (r"\.ln_final\.", ".final_layer_norm."),
    (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.class_embedding$", ".embeddings.class_embedding"),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
    (r"\.token_embedding\.", ".embeddings.token_embedding."),
    (r"^text_model\.text_projection$", "text_projection.weight"),
    (r"^vision_model\.proj$", "visual_projection.weight"),
)


def _model(path: str, processor: str, check: bool = False) -> CLIPModel:
    try:
        config = CLIPConfig.from_pretrained(processor_directory(processor))
    except (OSError, ValueError) as error:
        raise ConfigError(f"processor {processor!r} has no CLIP config: {' '.join(str(error).split())}") from error
    model = CLIPModel(config)
    fill(model, transformers_names(read_state(path)), path, check=check)
    return model
