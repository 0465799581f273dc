"""All that engines and learner know of a model: `Policy`, beside its light part (`stage_ray.policies.codec`).

A family subclasses both (README.md beside this file). No sampling loop lives here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from stage_ray.algorithm.divergence import Divergence
from stage_ray.config import PolicyConfig
from stage_ray.config.model_sizes import ModelSizes
from stage_ray.errors import ConfigError
from stage_ray.policies.backbone import Backbone
from stage_ray.policies.codec import Branch, ImageCodec, PromptIds
from stage_ray.policies.decoding import Decoder
from stage_ray.policies.logprobs import TokenLogprobs, chunked_divergence, chunked_logprobs
from stage_ray.pretrained import base_location, check_directory, export_checkpoint, located
from stage_ray.samplers import Context, SamplingParams, process_logits

if TYPE_CHECKING:
    from stage_ray.policies.lora import Adapters

LOGITS_AT_ONCE = 2**22  # float32 logits made at once by `token_logprobs`: 16 MiB, and a few temporaries of that size


class Policy(ABC):
    """One autoregressive image model. A family gives what is abstract; log-probabilities are the same for all.

    Attributes:
        model_type: what ``config.json`` of the family's checkpoints says.
        trained_prefix: of the ``state_dict`` names that are trained.
        vllm_model: ``module:Class`` of the model that vLLM runs, "" where there is none.
        model: all modules, frozen but for `trained_parameters`.
        backbone: the part that is trained and sharded.
        codec: the part without the backbone: prompts, codebook and pictures.
        adapters: with ``policy.lora`` what is trained in place of the parameters of `trained_prefix`.
    """

    model_type: ClassVar[str]
    trained_prefix: ClassVar[str]
    vllm_model: ClassVar[str] = ""
    adapters: Adapters | None = None

    def __init__(self, model: nn.Module, backbone: Backbone, codec: ImageCodec, *, trainable: bool = True) -> None:
        self.model = model
        self.backbone = backbone
        self.codec = codec
        self.image_tokens, self.codebook_size = codec.image_tokens, codec.codebook_size  # T and V
        model.requires_grad_(False)  # then the trained ones alone
        trained = {parameter: name for name, parameter in self.trained_parameters().items()}
        for parameter in trained:
            parameter.requires_grad_(trainable)
        # Remembered from the whole model: sharded parameters are new ones, which a head that was tied does not see.
        names = {n: trained[p] for n, p in model.named_parameters(remove_duplicate=False) if p in trained}
        self._tied = {name: own for name, own in names.items() if name != own}

    @classmethod
    def check(cls, config: PolicyConfig) -> ImageCodec | None:
        """Check a local checkpoint before a run, without loading its weights; what encodes its prompts.

        None for a hub id that is not in the cache: it is fetched, and checked, by the workers.

        Raises:
            ConfigError: files are missing or damaged, or it is of another architecture.
        """
        model = located(base_location(config.path))
        if model is None:
            return None
        check_directory(model, cls.model_type)
        return cls.load_codec(config, device=None)

    @classmethod
    def sizes(cls, directory: Path, path: str) -> ModelSizes | None:
        """Sizes of a local checkpoint, of which ``config.json`` is enough, for plans; ``path`` is what names it.

        None where the formulas of `stage_ray.learner.memory` do not hold for the family.
        """
        return None

    @classmethod
    @abstractmethod
    def load(
        cls, config: PolicyConfig, *, device: torch.device, dtype: torch.dtype = torch.float32, trainable: bool = True
    ) -> Policy:
        """Load a checkpoint, dropout off. Where it is not ``trainable`` it is for sampling: pictures in float32.

        Raises:
            ConfigError: missing or damaged files, another architecture, or tensors that the checkpoint lacks.
        """

    @classmethod
    @abstractmethod
    def load_codec(cls, config: PolicyConfig, *, device: torch.device | None) -> ImageCodec:
        """Load the codec alone, its image decoder on ``device``; None leaves the decoder out.

        Raises:
            ConfigError: as `load`.
        """

    @abstractmethod
    def embed_image_tokens(self, tokens: Tensor) -> Tensor:
        """Image tokens int64 [...] to the backbone's inputs, float [..., hidden]."""

    @abstractmethod
    def head(self, states: Tensor) -> Tensor:
        """States [..., hidden] -> logits float32 [..., V]."""

    @abstractmethod
    def decoder(self, sequences: int, length: int) -> Decoder:
        """A cached forward for so many sequences, each of at most ``length`` positions."""

    def save(
        self, directory: Path, state: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write the checkpoint again with new values of the trained parameters: ``state``, or their own."""
        state, texts = state or self.trained_parameters(), self.codec.texts()
        export_checkpoint(self.codec.location, directory, state, tied=self._tied, texts=texts, dtype=dtype)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the layers' activations in the backward pass; dropout, if a config has any, stays off.

        Raises:
            ConfigError: the family cannot.
        """
        raise ConfigError("learner.gradient_checkpointing is true, which this policy.family cannot do; set it to false")

    def drop_image_decoder(self) -> None:  # noqa: B027  not abstract: a family may have nothing to free
        """Free what only the codec's `decode` and `codebook` need, which then fail: a learner makes no pictures."""

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained by ``state_dict`` name, each once."""
        if self.adapters is not None:
            return self.adapters.parameters()
        parameters = self.model.named_parameters()
        return {name: parameter for name, parameter in parameters if name.startswith(self.trained_prefix)}

    def fsdp_modules(self) -> list[nn.Module]:
        """Modules whose parameters are gathered together in a sharded model: each layer, then the whole backbone.

        Before these stand trained modules outside of it, such as a head: call them, do not read their weights.
        """
        parameters, inside = self.model.named_parameters(), set(self.backbone.modules())
        trained = {parameter for name, parameter in parameters if name.startswith(self.trained_prefix)}
        others = [module for module in self.model.modules() if module not in inside]
        outside = [module for module in others if not trained.isdisjoint(module.parameters(recurse=False))]
        return [*outside, *self.backbone.layers, self.backbone]

    def hidden_states(self, prompts: Sequence[Branch], tokens: Tensor) -> Tensor:
        """States that predict the image tokens: B prompts, tokens int64 [B, T] -> float [B, T, hidden].

        Raises:
            ValueError: as many prompts as images are needed, none empty.
        """
        if len(prompts) != tokens.shape[0] or min(map(len, prompts), default=0) < 1:
            raise ValueError(f"{len(prompts)} prompts for {tokens.shape[0]} images; one each is needed, none empty")
        return self.backbone.predict(prompts, self.embed_image_tokens(tokens[:, :-1]))

    def image_logits(self, prompts: Sequence[Branch], tokens: Tensor) -> Tensor:
        """Teacher-forced logits of the image tokens: B prompts, tokens int64 [B, T] -> float32 [B, T, V]."""
        return self.head(self.hidden_states(prompts, tokens))

    def token_logprobs(
        self,
        prompts: Sequence[Branch],
        tokens: Tensor,
        *,
        entropy_grad: bool = True,
        divergence: tuple[Policy, Divergence] | None = None,
    ) -> TokenLogprobs:
        """Log-probability and entropy of each token at temperature 1, float32 [B, T].

        Differentiable, the entropy only with ``entropy_grad``. No more than `LOGITS_AT_ONCE` logits are held.
        ``divergence``: also from that policy, differentiable, at one more forward of it.
        """
        states = self.hidden_states(prompts, tokens)
        found = chunked_logprobs(states, tokens, self.head, rows=self._rows_at_once(), entropy_grad=entropy_grad)
        if divergence is None:
            return found
        reference, kind = divergence
        with torch.no_grad():
            theirs = reference.hidden_states(prompts, tokens)
        rows = self._rows_at_once(branches=2)
        parted = chunked_divergence(states, theirs, (self.head, reference.head), kind, rows=rows)
        return replace(found, divergence=parted)

    def guided_token_logprobs(
        self,
        prompts: Sequence[PromptIds],
        tokens: Tensor,
        params: SamplingParams,
        *,
        guided: Tensor | None = None,
        entropy_grad: bool = True,
        guided_grad: bool = False,
    ) -> TokenLogprobs:
        """Conditional log-probs and entropy, bitwise those of `token_logprobs`, and each token's guided log-prob.

        The latter, float32 [B, T], is that of the distribution which ``params`` sample from, minus infinity for a token
        that top-k or top-p now leaves out. ``guided``, bool [B], is False for images that were drawn without guidance.
        With ``guided_grad`` it carries a gradient through both branches. One forward of the backbone a branch.
        """
        states = self.hidden_states([prompt.conditional for prompt in prompts], tokens)
        plain = chunked_logprobs(states, tokens, self.head, rows=self._rows_at_once(), entropy_grad=entropy_grad)
        with torch.set_grad_enabled(guided_grad and torch.is_grad_enabled()):
            branches = [states]  # those of the conditional branch serve again
            if params.guided:
                branches.append(self.hidden_states([prompt.unconditional for prompt in prompts], tokens))
            rows = self._rows_at_once(len(branches))
            index = torch.arange(tokens.numel(), device=tokens.device)  # of a token among those of all images
            flat = torch.stack(branches, dim=2).flatten(0, 1)  # [B * T, K, hidden]
            parts = [
                self._guided_chunk(chunk, tokens, which, params, guided)
                for chunk, which in zip(flat.split(rows), index.split(rows), strict=True)
            ]
        return TokenLogprobs(plain.logprobs, plain.entropy, torch.cat(parts).view(tokens.shape))

    def _guided_chunk(
        self, states: Tensor, tokens: Tensor, which: Tensor, params: SamplingParams, guided: Tensor | None
    ) -> Tensor:
        """Guided log-probs of tokens number ``which`` [rows] of [B, T], from states [rows, K, hidden]: [rows]."""
        images, positions = which // tokens.shape[1], which % tokens.shape[1]

        def processed(chunk: Tensor) -> Tensor:
            logits, rows = self.head(chunk), len(chunk)  # [rows, K, V]; `chunked_logprobs` tries one row first
            with_guidance = None if guided is None else guided[images[:rows]]
            context = Context(positions[:rows], tokens[images[:rows]], with_guidance)
            return process_logits(logits[:, 0], logits[:, 1] if params.guided else None, params, context)

        return chunked_logprobs(states, tokens[images, positions], processed, rows=len(states)).logprobs

    def _rows_at_once(self, branches: int = 1) -> int:
        return max(1, LOGITS_AT_ONCE // (branches * self.codebook_size))
