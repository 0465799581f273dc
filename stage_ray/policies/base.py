"""What a policy is: a model family's prompts, log-probabilities and pictures. No sampling loop lives here."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from stage_ray.errors import ConfigError
from stage_ray.policies.logprobs import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class PromptIds:
    """Token ids of one prompt, both branches of equal length, ending in the token that begins an image.

    Example:
        >>> PromptIds((1, 5, 9), (1, 0, 9)).conditional
        (1, 5, 9)
    """

    conditional: tuple[int, ...]
    unconditional: tuple[int, ...]


class Policy(Protocol):
    """One autoregressive image model, loaded by plain transformers."""

    model: nn.Module
    image_tokens: int  # T
    codebook_size: int  # V

    def encode_prompt(self, text: str) -> PromptIds:
        """Prompt to token ids, chat template applied."""
        ...

    def image_logits(self, prompts: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
        """Teacher-forced logits of the image tokens: prompts of B lengths, tokens int64 [B, T] -> float [B, T, V]."""
        ...

    def token_logprobs(
        self, prompts: Sequence[Sequence[int]], tokens: Tensor, *, entropy_grad: bool = True
    ) -> TokenLogprobs:
        """Log-probability and entropy of each token at temperature 1; differentiable where the model is.

        Cheaper with ``entropy_grad`` off: the entropy then carries no gradient.
        """
        ...

    def guided_token_logprobs(
        self, prompts: Sequence[PromptIds], tokens: Tensor, rule: SamplingParams, *, entropy_grad: bool = True
    ) -> TokenLogprobs:
        """`token_logprobs` of the conditional branch, the same bits, and log p under what ``rule`` draws from.

        The latter carries no gradient. Guidance costs a second forward pass, of the unconditional branch.
        """
        ...

    def codebook(self) -> Tensor:
        """Codebook vectors as the image decoder gets them, float32 [V, D]."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] -> images uint8 [B, H, W, 3]."""
        ...

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that STAGE trains, by their ``state_dict`` name; the rest is frozen."""
        ...

    def fsdp_modules(self) -> list[nn.Module]:
        """Modules whose parameters are gathered together in a sharded model, inner ones first; the last is all."""
        ...

    def save(self, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a Hugging Face checkpoint that plain transformers loads; ``state`` replaces the model's weights."""
        ...


def device_for(gpus: float, key: str = "gpus") -> torch.device:
    """A GPU where the role reserved one, else the CPU; ``key`` is the config's, for the message.

    Raises:
        ConfigError: a GPU is reserved and torch cannot use it.

    Example:
        >>> device_for(0)
        device(type='cpu')
    """
    if gpus > 0 and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
        raise ConfigError(
            f"{key} = {gpus:g} reserves a GPU, but torch {torch.__version__} on {socket.gethostname()} sees none: it "
            f"{built}; set {key}=0, or mend the driver or the installation there (stage-ray doctor looks at both)"
        )
    return torch.device("cuda" if gpus > 0 else "cpu")


def hardware_has_bfloat16(device: torch.device) -> bool:
    """True where the device multiplies bfloat16 matrices itself (AVX-512 BF16 or AMX on a CPU)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """What a config's dtype means on this device: ``auto`` is bfloat16 where the hardware computes in it.

    Example:
        >>> compute_dtype("float32", torch.device("cpu"))
        torch.float32
    """
    if choice != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice]
    return torch.bfloat16 if hardware_has_bfloat16(device) else torch.float32
