"""LlamaGen without its transformer: classes or captions, the image tokenizer, and the config that vLLM reads."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies.codec import Branch, ImageCodec, PromptIds, VllmSpec
from stage_ray.policies.image_tokenizer import codebook, decode, encode, load_tokenizer
from stage_ray.policies.llamagen.classes import ClassNames, imagenet
from stage_ray.policies.llamagen.text import TextEncoder, text_encoder
from stage_ray.pretrained import local_checkpoint, read_tensors

if TYPE_CHECKING:
    from transformers import JanusVQVAE

    from stage_ray.config.model_sizes import ModelSizes
    from stage_ray.policies.llamagen.model import LlamaGenConfig

MODEL_TYPE = "llamagen"
TRAINED_PREFIX, VQ_PREFIX, UNCONDITIONAL = "gpt.", "vq.", "unconditional"


class LlamaGenCodec(ImageCodec):
    """What a LlamaGen checkpoint holds beside its transformer.

    A prompt is one class; or the tokens of a caption, which the text encoder makes features of. Without guidance it
    is the last class, none; or as many rows as the caption has tokens, the last of ``unconditional``, counted from its
    end: -1 is the last.

    Attributes:
        config: transformers' own.
        vqmodel: the image tokenizer; None where nothing is decoded here.
        unconditional: float32 [prompt_tokens, width], what stands for no caption; only with ``condition: text``.
    """

    vqmodel: JanusVQVAE | None = None
    unconditional: Tensor | None = None
    _sizes: ModelSizes | None = None

    def __init__(self, location: Path, config: LlamaGenConfig, device: torch.device | None) -> None:
        """Read all but weights; the text encoder, if there is one, is to compute on ``device``."""
        self.location, self.config = location, config
        self.grid = (config.side, config.side)
        self.codebook_size = config.codes
        self.positions = config.prompt_tokens + config.side**2
        names = config.class_names or (imagenet() if config.num_classes == len(imagenet()) else ())
        self._classes = ClassNames(names, config.num_classes)
        self._for_text, self._device = config.condition == "text", device
        if self._for_text and not config.text_encoder:
            raise ConfigError(f"policy.path: {location / 'config.json'} names no text_encoder, a flan-t5-xl")

    @classmethod
    def load(cls, policy: PolicyConfig, device: torch.device | None, *, tokenizer: bool = True) -> LlamaGenCodec:
        """Read config and names; where a device is given, what stands for no caption, and the image ``tokenizer``.

        Raises:
            ConfigError: the checkpoint is missing, incomplete, or not LlamaGen.
        """
        from stage_ray.policies.llamagen.model import LlamaGenConfig  # late: it takes seconds

        location = local_checkpoint(policy.path, MODEL_TYPE)
        try:
            config = LlamaGenConfig.from_pretrained(location)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"policy.path: {location} does not load as a LlamaGen model: {error}") from error
        codec = cls(location, config, device)
        if device is not None and config.condition == "text":
            (codec.unconditional,) = read_tensors(location, (UNCONDITIONAL,)).values()
        if device is not None and tokenizer:
            codec.vqmodel = load_tokenizer(location, config.vq(), VQ_PREFIX, device)
        return codec

    def encode_prompt(self, text: str) -> PromptIds:
        """A class by its number or name; or a caption's tokens, no more than the model has room for."""
        if not self._for_text:
            return PromptIds((self._classes.number(text),), (self.config.num_classes,))
        tokens, most = self._text.tokens(text), self.config.prompt_tokens
        if len(tokens) > most:
            raise ValueError(f"caption of {len(tokens)} tokens, at most {most} fit this model: {text[:80]!r}")
        return PromptIds(tokens, tuple(range(-len(tokens), 0)))

    def prompt_encoding(self) -> object:
        """The names of classes, in order; or what the text encoder's tokenizer makes of a text."""
        return super().prompt_encoding() if self._for_text else self._classes.classes

    @cached_property
    def _text(self) -> TextEncoder:
        """Looked for when the first caption comes: without one, as in a conversion, it need not be there."""
        return text_encoder(str(self.config.text_encoder), self._device)

    def prompt_features(self, branch: Branch) -> Tensor:
        """Features of a caption or of none, float [its entries, width]."""
        assert self.unconditional is not None, "this codec was loaded without weights"
        if branch[-1] < 0:  # a caption ends in a token, which is no negative number
            return self.unconditional[-len(branch) :]
        return self._text.features(branch)

    def sizes(self) -> ModelSizes:
        """Counted from the config, once; see `ImageCodec.sizes`."""
        from stage_ray.policies.llamagen.sizes import config_sizes  # late: see the top

        if self._sizes is None:
            self._sizes = config_sizes(self.config, self.location.name, str(self.location))
        return self._sizes

    def codebook(self) -> Tensor:
        """Codebook vectors as the decoder gets them, float32 [V, D], of length 1."""
        return codebook(self._tokenizer())

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] -> images uint8 [B, H, W, 3] on the CPU."""
        return decode(self._tokenizer(), tokens, self.grid, rounded=True)

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3] -> tokens int64 [B, T] on the CPU, as LlamaGen's own code finds them."""
        return encode(self._tokenizer(), images)

    def vllm_spec(self) -> VllmSpec:
        """A Llama's config, and under ``llamagen`` what is not a Llama's.

        Image tokens are ids 0..V-1, so that logits are V wide and a sampled id is fed back; behind them come classes,
        or rows of features. Captions are of many lengths, so their positions are those of M-RoPE, which a request
        brings along; all its rows are alike here.
        """
        config, text = self.config, self._for_text
        flat: dict[str, Any] = config.llama().to_diff_dict() | {
            "model_type": "llama",
            "num_key_value_heads": config.num_key_value_heads,
            "vocab_size": config.codes + (0 if text else config.num_classes + 1),
            "tie_word_embeddings": False,
            "llamagen": {
                "prompt_tokens": config.prompt_tokens,
                "side": config.side,
                "codes": config.codes,
                "rope_theta": config.rope_theta,
                "classes": 0 if text else config.num_classes + 1,
                "caption_width": config.caption_width if text else 0,
            },
        }
        if text:
            flat["rope_parameters"] = {"rope_type": "default", "mrope_section": [1] * 3}
        width = config.caption_width if text else 0
        return VllmSpec(config=flat, prompt_shift=config.codes, frozen=(), prompt_features=width)

    def _tokenizer(self) -> JanusVQVAE:
        if self.vqmodel is None:
            raise RuntimeError("this process has no image decoder: its codec was loaded without one")
        return self.vqmodel
