"""Janus without its language model: prompts, the VQ image tokenizer, and the config that vLLM reads.

transformers' Janus classes take seconds to import, so that waits until a checkpoint is loaded.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies.codec import ImageCodec, PromptIds, VllmSpec
from stage_ray.policies.image_tokenizer import codebook, decode, encode, load_tokenizer
from stage_ray.pretrained import local_checkpoint, read_object

if TYPE_CHECKING:
    from transformers import JanusConfig, JanusProcessor, JanusVQVAE

    from stage_ray.config.model_sizes import ModelSizes

MODEL_TYPE = "janus"
TRAINED_PREFIX, VQ_PREFIX = "model.language_model.", "model.vqmodel."
PAPER_ROLES = {"<|User|>": "User", "<|Assistant|>": "Assistant"}
# What vLLM's flat config must not inherit from the text config: names, dtypes and tokens that mean something else here.
LEFT_OUT = ("architectures", "model_type", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path")


class JanusCodec(ImageCodec):
    """What a Janus checkpoint holds beside its language model.

    Attributes:
        config, processor: transformers' own.
        vqmodel: the image tokenizer; None where nothing is decoded here.
    """

    vqmodel: JanusVQVAE | None = None
    _sizes: ModelSizes | None = None

    def __init__(self, location: Path, config: JanusConfig, processor: JanusProcessor, template: str) -> None:
        """``template`` is a config's ``policy.template``: the official roles or the paper's.

        Raises:
            ConfigError: the processor has no chat template.
        """
        chat_template: Any = processor.chat_template
        if not isinstance(chat_template, str):
            where = processor.tokenizer.name_or_path
            raise ConfigError(f"policy.path: {where} has no chat template (chat_template.jinja)")
        for official, paper in PAPER_ROLES.items() if template == "paper" else ():
            chat_template = chat_template.replace(official, paper)  # the roles are plain text in it
        self.location, self.config, self.processor, self._chat_template = location, config, processor, chat_template
        self._special = _special_ids(location, processor)
        side = int(config.vq_config.num_patches)
        self.grid = (side, side)
        self.codebook_size = int(config.vq_config.num_embeddings)
        self.positions = int(config.text_config.max_position_embeddings)
        self._cached_ids = lru_cache(maxsize=4096)(self._prompt_ids)  # one prompt is asked for many times

    @classmethod
    def load(cls, policy: PolicyConfig, device: torch.device | None = None) -> JanusCodec:
        """Read configs, tokenizer and template; where a device is given, the image tokenizer too, frozen, in float32.

        Raises:
            ConfigError: the checkpoint is missing, incomplete, or not Janus.
        """
        from transformers import AutoProcessor, JanusConfig, JanusProcessor

        location = local_checkpoint(policy.path, MODEL_TYPE)
        try:
            config = JanusConfig.from_pretrained(location)
            processor = AutoProcessor.from_pretrained(location, trust_remote_code=policy.trust_remote_code)
        except AttributeError as error:  # of the tokenizer, which its processor asks for its image tokens
            raise ConfigError(
                f"policy.path: {location}: the tokenizer names no image tokens ({error}); its tokenizer_config.json "
                "needs image_token, boi_token and eoi_token, as transformers' own Janus checkpoints have them"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"policy.path: {location} does not load as a Janus model: {error}") from error
        if not isinstance(config, JanusConfig) or not isinstance(processor, JanusProcessor):
            raise ConfigError(f"policy.path: {location} is not a Janus model with its processor")
        codec = cls(location, config, processor, policy.template)
        if device is not None:
            codec.vqmodel = load_tokenizer(location, config.vq_config, VQ_PREFIX, device)
        return codec

    def sizes(self) -> ModelSizes:
        """Counted from the config, once; see `ImageCodec.sizes`."""
        from stage_ray.policies.janus.builder import config_sizes  # late: see the top

        if self._sizes is None:
            self._sizes = config_sizes(self.config, self.location.name, str(self.location))
        return self._sizes

    def texts(self) -> dict[str, str]:
        """The chat template as it was trained with, where that is not the checkpoint's own."""
        own = self._chat_template == self.processor.chat_template
        return {} if own else {"chat_template.jinja": self._chat_template}

    def encode_prompt(self, text: str) -> PromptIds:
        """See `_prompt_ids`."""
        return self._cached_ids(text)

    def _prompt_ids(self, text: str) -> PromptIds:
        """The chat with the image to begin, and the same with every token but bos and boi replaced by pad.

        Pads are attended to, as in ``generate`` of transformers (and the paper's code, arXiv 2509.25027).
        """
        messages, template = [{"role": "user", "content": [{"type": "text", "text": text}]}], self._chat_template
        chat = self.processor.apply_chat_template(messages, add_generation_prompt=True, chat_template=template)
        encoded = self.processor(text=[chat], generation_mode="image")
        conditional = tuple(int(token) for token in encoded["input_ids"][0])  # hashable, and no array of NumPy
        bos, pad, boi = self._special
        if conditional.count(boi) != 1:
            raise ValueError(f"prompt {text[:80]!r} holds the token that begins an image; write it otherwise")
        return PromptIds(conditional, tuple(i if i in (bos, boi) else pad for i in conditional))

    def codebook(self) -> Tensor:
        """Codebook vectors as the decoder gets them, float32 [V, D], of length 1."""
        return codebook(self._tokenizer())

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] -> images uint8 [B, H, W, 3] on the CPU."""
        return decode(self._tokenizer(), tokens, self.grid)

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3] -> tokens int64 [B, T] on the CPU, as LlamaGen's own code finds them."""
        return encode(self._tokenizer(), images)

    def vllm_spec(self) -> VllmSpec:
        """The language model's config at the top level, and under ``janus`` what the image modules need.

        Image tokens are ids 0..V-1, so that logits are V wide and a sampled id is fed back; text ids are shifted by V.
        """
        text, vq = self.config.text_config, self.config.vq_config
        flat = {key: value for key, value in text.to_dict().items() if key not in LEFT_OUT}
        flat |= {
            "model_type": "llama",
            "vocab_size": self.codebook_size + text.vocab_size,
            "tie_word_embeddings": False,
            "janus": {"vq_config": vq.to_dict(), "text_vocab_size": text.vocab_size},
        }
        return VllmSpec(config=flat, prompt_shift=self.codebook_size, frozen=("model.generation_",))

    def _tokenizer(self) -> JanusVQVAE:
        if self.vqmodel is None:
            raise RuntimeError("this process has no image decoder: its codec was loaded without one")
        return self.vqmodel


def _special_ids(location: Path, processor: JanusProcessor) -> tuple[int, int, int]:
    """Ids of bos, pad and the token that begins an image: the generation config's, else the tokenizer's."""
    file, tokenizer = location / "generation_config.json", processor.tokenizer
    given = read_object(file) if file.is_file() else {}
    given |= given.get("generation_kwargs") or {}
    found = []
    for name in ("bos", "pad", "boi"):
        token = given.get(f"{name}_token_id")
        if token is None:
            token = tokenizer.convert_tokens_to_ids(getattr(tokenizer, f"{name}_token", None) or [])
        if not isinstance(token, int):
            raise ConfigError(
                f"policy.path: {location} has no {name} token: neither does {file.name} give {name}_token_id, nor its "
                f"tokenizer a {name}_token; add one of them"
            )
        found.append(token)
    return found[0], found[1], found[2]
