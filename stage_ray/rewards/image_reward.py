"""ImageReward (Xu et al., arXiv 2304.05977): a BLIP that reads prompt and picture together, tuned on human rankings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPImageProcessorPil

from stage_ray.config.hub import HUB
from stage_ray.errors import ConfigError
from stage_ray.records import Prompt
from stage_ray.rewards.aesthetic import Head
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.clip import BatchSize
from stage_ray.rewards.models import Dtype, device_of, fill, load_tokenizer, processor_directory, read_state

PUBLISHED = "hf://zai-org/ImageReward/ImageReward.pt"
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072  # of the published code
TEXT_LENGTH = 35  # tokens; the rest of a prompt is cut
HEAD_WIDTH = 64  # of one attention head, in both towers
VISION_EPS = 1e-6


class ImageRewardReward:
    """Standardised by the published mean and deviation: about -2..2. Compares pictures of one prompt."""

    def __init__(
        self,
        path: str = PUBLISHED,
        processor: str = "google-bert/bert-base-uncased",
        batch_size: BatchSize = 32,
        dtype: Dtype = "float32",
        device: str | None = None,
    ) -> None:
        """Load the published file (Apache-2.0), read as tensors alone.

        Args:
            path: ``ImageReward.pt``, here or ``hf://OWNER/NAME/FILE``. The sizes of the model are its tensors'.
            processor: where the tokenizer of BERT is.
            batch_size, dtype, device: as of `ClipReward`.
        """
        state = read_state(path)
        self._model = Blip(state)
        fill(self._model, transformers_names(state), path)
        self._model.eval().to(device_of(device), getattr(torch, dtype))
        self._tokenizer, self._batch_size = load_tokenizer(processor_directory(processor), "processor"), batch_size
        side = self._model.image_size  # CLIP's preparation, as the published code has it
        self._prepare = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    @classmethod
    def check(
        cls,
        prompts: Sequence[Prompt],
        path: str = PUBLISHED,
        processor: str = "google-bert/bert-base-uncased",
        **options: Any,
    ) -> Iterator[tuple[Prompt, str]]:
        """Check files that lie here, down to the shapes of tensors; see `Reward`. It judges every prompt."""
        if not path.startswith(HUB):
            state = read_state(path)
            with torch.device("meta"):
                fill(Blip(state), transformers_names(state), path, check=True)
            load_tokenizer(processor_directory(processor), "processor")
        return iter(())

    @torch.inference_mode()
    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt's text (cut at 35 tokens)."""
        rows = []
        weight = self._model.head.layers[0].weight
        for start in range(0, len(images), self._batch_size):
            texts = [prompt.text for prompt in prompts[start : start + self._batch_size]]
            tokens = self._tokenizer(
                texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
            ).to(weight.device)
            pictures = [Image.fromarray(image) for image in images[start : start + self._batch_size]]
            pixels = self._prepare(pictures, return_tensors="pt")["pixel_values"].to(weight.device, weight.dtype)
            rows.append(self._model(pixels, tokens["input_ids"], tokens["attention_mask"]).cpu())
        scores = ((torch.cat(rows) - SCORE_MEAN) / SCORE_STD).numpy().astype(np.float32)
        return RewardOutput(scores, np.isfinite(scores), tuple({} for _ in scores))


class Blip(nn.Module):
    """BLIP's picture encoder, its text encoder that looks at the picture, and the head, in the sizes of ``state``."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        vision, text = "blip.visual_encoder.", "blip.text_encoder."
        patch = _tensor(state, f"{vision}patch_embed.proj.weight")  # [width, 3, p, p]
        width, layers = patch.shape[0], _layers(state, f"{vision}blocks.")
        side = round((_tensor(state, f"{vision}pos_embed").shape[1] - 1) ** 0.5)
        self.image_size = side * patch.shape[-1]
        self.visual_encoder = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=_tensor(state, f"{vision}blocks.0.mlp.fc1.weight").shape[0],
                num_hidden_layers=layers,
                num_attention_heads=max(1, width // HEAD_WIDTH),
                image_size=self.image_size,
                patch_size=patch.shape[-1],
                layer_norm_eps=VISION_EPS,
            )
        )
        words = _tensor(state, f"{text}embeddings.word_embeddings.weight")  # [V, hidden]
        self.text_encoder = BlipTextModel(
            BlipTextConfig(
                vocab_size=words.shape[0],
                hidden_size=words.shape[1],
                encoder_hidden_size=width,
                intermediate_size=_tensor(state, f"{text}encoder.layer.0.intermediate.dense.weight").shape[0],
                num_hidden_layers=_layers(state, f"{text}encoder.layer."),
                num_attention_heads=max(1, words.shape[1] // HEAD_WIDTH),
                max_position_embeddings=_tensor(state, f"{text}embeddings.position_embeddings.weight").shape[0],
            ),
            add_pooling_layer=False,
        )
        self.head = Head(words.shape[1])

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Raw scores, float32 [B], of pixels [B, 3, h, w] and token ids [B, 35] with their mask."""
        seen = self.visual_encoder(pixels).last_hidden_state
        read = self.text_encoder(tokens, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return self.head(read[:, 0].to(self.head.layers[0].weight.dtype))


def transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the published file under the names of `Blip`; views, nothing is copied."""
    found = {}
    for name, tensor in state.items():
        name = re.sub("^mlp[.]", "head.", name).removeprefix("blip.")
        if name.startswith("visual_encoder."):
            for old, new in RENAMED:
                name = re.sub(old, new, name)
        found[name] = tensor
    return found


RENAMED = (
    (r"\.cls_token$", ".embeddings.class_embedding"),
    (r"\.pos_embed$", ".embeddings.position_embedding"),
    (r"\.patch_embed\.proj\.", ".embeddings.patch_embedding."),
    (r"\.blocks\.", ".encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"^visual_encoder\.norm\.", "visual_encoder.post_layernorm."),
)


def _tensor(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ConfigError(f"path: the file lacks tensor {name}; it is not ImageReward.pt, or was cut short")
    return state[name]


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})
