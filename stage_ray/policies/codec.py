"""The light part of a model family: text to prompts, image tokens to pictures. All of it that the vLLM engine loads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stage_ray.config.model_sizes import ModelSizes
from stage_ray.errors import ConfigError

PROBE = "a photo of two green squares and 3 red rings, left of a 猫"  # any text: tokenizers differ on it or nowhere

Branch = tuple[int, ...]
"""What an image is conditioned on, an entry a position: token ids or a class. Only its own family looks inside."""


@dataclass(frozen=True, slots=True)
class PromptIds:
    """One prompt, both branches of guidance; the last entry of each predicts the first token. Lengths may differ."""

    conditional: Branch
    unconditional: Branch

    @property
    def longest(self) -> int:
        """Tokens of the longer branch."""
        return max(len(self.conditional), len(self.unconditional))


@dataclass(frozen=True, slots=True)
class VllmSpec:
    """How vLLM serves a checkpoint: a model class of its own, over the checkpoint's safetensors.

    Attributes:
        config: the ``config.json`` that vLLM reads: flat, with Llama's keys and what the model class needs.
        prompt_shift: added to prompt ids, for a vocabulary that holds the image tokens first.
        frozen: prefixes of the tensors that the model class loads beside the trained ones.
        prompt_features: F, where prompts are rows of features (`ImageCodec.prompt_features`) and not ids; 0 is ids. The
            engine writes a batch's rows into ``prompt_features`` of the model, float [rows, F], as many as it batches
            tokens, and a prompt's ids are the numbers of its rows.
        row_end: an id that is read after each row of the grid but the last (`ImageCodec.forced`); None is none.
    """

    config: dict[str, Any]
    prompt_shift: int
    frozen: tuple[str, ...]
    prompt_features: int = 0
    row_end: int | None = None


class ImageCodec(ABC):
    """A family without its backbone.

    Attributes:
        location: the checkpoint's directory.
        grid: image tokens along height and width.
        codebook_size: V, entries of the image codebook.
        positions: that prompt and image may have together; None is any number.
        forced: positions of an image beside its tokens, whose ids are read and never drawn, such as ends of rows.
    """

    location: Path
    grid: tuple[int, int]
    codebook_size: int
    positions: int | None = None
    forced: int = 0

    @property
    def image_tokens(self) -> int:
        """T, tokens of one image that are drawn."""
        return self.grid[0] * self.grid[1]

    @property
    def image_positions(self) -> int:
        """Positions of one image, forced ones among them."""
        return self.image_tokens + self.forced

    def check_prompt(self, text: str, longest: int) -> PromptIds:
        """`encode_prompt`; a ValueError where that is over ``longest`` tokens, or more than the model has room for."""
        prompt, room = self.encode_prompt(text), longest
        key = "rollout.max_prompt_tokens"
        if self.positions is not None and self.positions - self.image_positions < longest:
            room, key = self.positions - self.image_positions, "the model's positions less its image tokens"
        if (count := prompt.longest) > room:
            raise ValueError(f"prompt of {count} tokens, at most {room} fit ({key}): {text[:80]!r}")
        return prompt

    def prompt_encoding(self) -> object:
        """What is equal in two checkpoints that encode prompts alike; the default is the encoding of `PROBE`."""
        return self.encode_prompt(PROBE)

    def prompt_features(self, branch: Branch) -> Tensor:
        """What vLLM reads of a prompt whose entries are no ids there, float [its entries, F]; see `VllmSpec`."""
        raise NotImplementedError

    def sizes(self) -> ModelSizes | None:
        """What the formulas of `stage_ray.learner.memory` need; None where they do not hold for this family."""
        return None

    def texts(self) -> dict[str, str]:
        """Files of the checkpoint, by name, that an export must have otherwise, such as another chat template."""
        return {}

    @abstractmethod
    def encode_prompt(self, text: str) -> PromptIds:
        """Both branches of a prompt, chat template applied.

        Raises:
            ValueError: this model cannot draw it; preflight says so with the prompt's line.
        """

    @abstractmethod
    def codebook(self) -> Tensor:
        """Codebook vectors as the image decoder gets them, float32 [V, D]."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] -> images uint8 [B, H, W, 3] on the CPU."""

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3], of the size that `decode` gives -> tokens int64 [B, T] on the CPU.

        Raises:
            ConfigError: the family cannot.
        """
        raise ConfigError(f"{type(self).__name__} has no encode, so this policy.family cannot read pictures")

    @abstractmethod
    def vllm_spec(self) -> VllmSpec:
        """How vLLM serves this checkpoint.

        Raises:
            ConfigError: it cannot.
        """
