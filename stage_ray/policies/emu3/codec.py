"""Emu3 without its language model: prompts, the image tokenizer, and the config that vLLM reads.

An image is rows of image tokens, each row closed by one fixed token. Behind the last row a whole sequence has
that token, end-of-file and end-of-image; nothing of an image depends on these three, so they are not computed.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies.codec import Branch, ImageCodec, PromptIds, VllmSpec
from stage_ray.policies.emu3.grid import grid_of, picture_size
from stage_ray.policies.image_tokenizer import fill
from stage_ray.pretrained import local_checkpoint

if TYPE_CHECKING:
    from transformers import Emu3Config, Emu3Processor, Emu3VQVAE

    from stage_ray.config.model_sizes import ModelSizes

MODEL_TYPE = "emu3"
# Names of tensors in a checkpoint. transformers has other ones for the model that it loads: see `Emu3Parts`.
TRAINED_PREFIX, VQ_PREFIX, HEAD = "text_model.model.", "vqmodel.", "text_model.lm_head."
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)  # of the model card, which guidance leads away from
# What vLLM's flat config must not inherit from the text config: names, dtypes and tokens that mean something else here.
LEFT_OUT = ("architectures", "model_type", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path")


class Emu3Codec(ImageCodec):
    """What an Emu3 checkpoint holds beside its language model.

    ``image_area`` (pixels), ``ratio`` (width:height) and ``negative_prompt`` of ``config.json`` replace those of the
    published model.

    Attributes:
        config, processor: transformers' own.
        first: id of image token 0; the others follow it.
        row_end: id of the token that closes a row.
        vqmodel: the image tokenizer; None where nothing is decoded here.
    """

    vqmodel: Emu3VQVAE | None = None
    _sizes: ModelSizes | None = None

    def __init__(self, location: Path, config: Emu3Config, processor: Emu3Processor) -> None:
        """Read all but weights.

        Raises:
            ConfigError: the config's vocabulary or picture size is not that of an Emu3.
        """
        self.location, self.config, self.processor = location, config, processor
        self.codebook_size = int(config.vq_config.codebook_size)
        self.positions = int(config.text_config.max_position_embeddings)
        self.first, self.row_end = _image_ids(location, config)
        self._area, self._ratio = picture_size(config)
        self.grid = grid_of(processor, config, location)
        self.forced = self.grid[0] - 1  # nothing reads what closes the last row
        if self.image_positions >= self.positions:
            raise ConfigError(
                f"policy.path: {location / 'config.json'}: image_area = {self._area} is {self.image_positions} "
                f"positions, and max_position_embeddings = {self.positions} leave no prompt room; lower image_area"
            )
        self._negative = str(getattr(config, "negative_prompt", NEGATIVE_PROMPT))
        self._cached_ids = lru_cache(maxsize=4096)(self._prompt_ids)  # one prompt is asked for many times

    @classmethod
    def load(cls, policy: PolicyConfig, device: torch.device | None = None) -> Emu3Codec:
        """Read configs and tokenizer; where a device is given, the image tokenizer too, frozen, in float32.

        Raises:
            ConfigError: the checkpoint is missing, incomplete, or not Emu3.
        """
        from transformers import Emu3Config, Emu3Processor, Emu3VQVAE  # late: they take seconds

        location = local_checkpoint(policy.path, MODEL_TYPE)
        try:
            config, processor = Emu3Config.from_pretrained(location), Emu3Processor.from_pretrained(location)
        except AttributeError as error:  # of the tokenizer, which its processor asks for its special tokens
            raise ConfigError(
                f"policy.path: {location}: the tokenizer names no image tokens ({error}); its tokenizer_config.json "
                "needs image_token, boi_token, eoi_token, image_wrapper_token and eof_token, as transformers' own "
                "Emu3 checkpoints have them"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"policy.path: {location} does not load as an Emu3 model: {error}") from error
        codec = cls(location, config, processor)
        if device is not None:
            codec.vqmodel = Emu3VQVAE(config.vq_config)
            fill(codec.vqmodel, location, VQ_PREFIX)
            codec.vqmodel.to(device).float().eval()
        return codec

    def encode_prompt(self, text: str) -> PromptIds:
        """The text and the image's size in tokens, up to where the image begins; the negative prompt likewise."""
        return PromptIds(self._cached_ids(text), self._cached_ids(self._negative))

    def _prompt_ids(self, text: str) -> Branch:
        size: dict[str, Any] = {"ratio": self._ratio, "image_area": self._area}
        ids = self.processor(text=[text], return_for_image_generation=True, **size)["input_ids"][0]
        begin = self.processor.tokenizer.convert_tokens_to_ids(self.processor.fake_token_around_image)
        if list(ids).count(begin) != 1:
            raise ValueError(f"prompt {text[:80]!r} holds the token that begins an image; write it otherwise")
        return tuple(int(token) for token in ids)  # hashable, and no array of NumPy

    def sizes(self) -> ModelSizes:
        """Counted from the config, once; see `ImageCodec.sizes`."""
        from stage_ray.policies.emu3.sizes import config_sizes  # late: see `load`

        if self._sizes is None:
            self._sizes = config_sizes(self.config, self.grid, self.location.name, str(self.location))
        return self._sizes

    def codebook(self) -> Tensor:
        """Codebook vectors as the decoder gets them, float32 [V, D]."""
        return self._tokenizer().quantize.embedding.weight.detach().float()

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] -> images uint8 [B, H, W, 3] on the CPU, by transformers' decoder, one at a time.

        The decoder makes four frames of a picture, of which the first is it, so its feature maps are large.
        """
        vqmodel = self._tokenizer()
        grids = tokens.to(vqmodel.quantize.embedding.weight.device).unflatten(1, self.grid)
        maps = [vqmodel.decode(grid).float().cpu() for grid in grids.split(1)]  # [1, 3, H, W], about -1..1
        pictures = self.processor.postprocess(list(torch.cat(maps)), return_tensors="PIL.Image.Image")
        return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures["pixel_values"]]))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3] -> tokens int64 [B, T] on the CPU, by transformers' encoder, one at a time."""
        vqmodel, norm = self._tokenizer(), self.processor.image_processor
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (norm.image_mean, norm.image_std))
        pixels = (images.permute(0, 3, 1, 2).float() * norm.rescale_factor - mean) / std
        size = torch.tensor([images.shape[1:3]])
        device = vqmodel.quantize.embedding.weight.device
        found = [vqmodel.encode(one.to(device), size).image_tokens[0].cpu() for one in pixels.split(1)]
        return torch.stack(found).flatten(1)

    def vllm_spec(self) -> VllmSpec:
        """The language model's config at the top level, and under ``emu3`` what is not a Llama's.

        Image tokens are ids 0..V-1, so that logits are V wide and a sampled id is fed back; the vocabulary of the
        checkpoint, image tokens included, is shifted by V.
        """
        text, codes = self.config.text_config, self.codebook_size
        flat = {key: value for key, value in text.to_dict().items() if key not in LEFT_OUT}
        flat |= {
            "model_type": "llama",
            "vocab_size": codes + text.vocab_size,
            "tie_word_embeddings": False,
            "emu3": {"codes": codes, "first": self.first, "vocabulary": text.vocab_size},
        }
        return VllmSpec(config=flat, prompt_shift=codes, frozen=(HEAD,), row_end=codes + self.row_end)

    def _tokenizer(self) -> Emu3VQVAE:
        if self.vqmodel is None:
            raise RuntimeError("this process has no image decoder: its codec was loaded without one")
        return self.vqmodel


def _image_ids(location: Path, config: Emu3Config) -> tuple[int, int]:
    """Ids of image token 0 and of what closes a row, by the config's vocabulary."""
    from transformers.models.emu3.modeling_emu3 import Emu3ImageVocabularyMapping

    where, mapping = location / "config.json", Emu3ImageVocabularyMapping(config.vocabulary_map or {})
    numbers, codes = mapping.img2bpe, int(config.vq_config.codebook_size)
    first = numbers.get(0, 0)
    if numbers != {code: first + code for code in range(codes)}:
        raise ConfigError(
            f"policy.path: {where}: vocabulary_map has {len(numbers)} image tokens for a codebook of {codes}; it must "
            "number '<|visual token 000000|>' and all that follow one after the other"
        )
    if mapping.eol_token_id is None:
        raise ConfigError(f"policy.path: {where}: vocabulary_map lacks '<|extra_200|>', which closes a row of an image")
    if config.tie_word_embeddings or config.text_config.tie_word_embeddings:
        raise ConfigError(
            f"policy.path: {where}: tie_word_embeddings is true; an Emu3 whose head shares its embeddings is not "
            "supported, as none is published"
        )
    return first, mapping.eol_token_id
