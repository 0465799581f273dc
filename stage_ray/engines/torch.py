"""The reference engine: transformers' modules, a static key-value cache, one step at a time. Best for tiny models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.engines.batching import BatchEngine, ImageSequence, Rollouts
from stage_ray.engines.sampling import Sample, SamplingParams, sample
from stage_ray.engines.static_decoder import StaticDecoder
from stage_ray.policies.base import PromptIds, compute_dtype, device_for
from stage_ray.policies.janus import JanusPolicy


class TorchEngine(BatchEngine):
    """Guided sampling with the policy's own modules; conditional and unconditional rows of an image share a batch."""

    def __init__(self, policy: PolicyConfig, rollout: RolloutConfig, *, worker: str) -> None:
        super().__init__(worker, rollout.images_per_batch, SamplingParams.of(rollout))
        device = device_for(rollout.gpus, "rollout.gpus")
        self._device = device
        self._policy = JanusPolicy.load(policy, device=device, dtype=compute_dtype(rollout.dtype, device))
        self._policy.model.requires_grad_(False)
        model = self._policy.model
        with torch.no_grad():  # of every image token, once: the modules that make them are not trained
            self._image_embeds = model.prepare_embeddings_for_image_generation(
                torch.arange(self._policy.codebook_size, device=device)
            )
        # Pictures do not come from rounded weights; a CPU convolves faster with channels last.
        self._policy.model.model.vqmodel.to(dtype=torch.float32, memory_format=torch.channels_last)

    @property
    def codebook_size(self) -> int:
        """V: every token it draws is one of 0..V-1."""
        return self._policy.codebook_size

    def encode_prompt(self, text: str) -> PromptIds:
        """Prompt to token ids of both branches."""
        return self._policy.encode_prompt(text)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] -> images uint8 [B, H, W, 3]."""
        return self._policy.decode(tokens)

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the language model's parameters."""
        return {name: tuple(parameter.shape) for name, parameter in self._policy.trained_parameters().items()}

    @torch.no_grad()
    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Take checked tensors, cast to the model's dtype; a CPU reads those that need no cast where they lie."""
        for name, parameter in self._policy.trained_parameters().items():
            if parameter.device.type == "cpu":
                parameter.data = tensors[name].to(parameter.dtype)
            else:
                parameter.copy_(tensors[name])

    def offload(self) -> None:
        """Move the model to the machine's memory; caches live only as long as a wave."""
        self._move(torch.device("cpu"))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def onload(self) -> None:
        """Move the model to its device."""
        self._move(self._device)

    def _move(self, device: torch.device) -> None:
        self._policy.model.to(device)
        self._image_embeds = self._image_embeds.to(device)

    def close(self) -> None:
        """Drop the model."""
        del self._policy, self._image_embeds

    @torch.inference_mode()
    def sample(self, rows: Sequence[ImageSequence], rule: SamplingParams) -> Rollouts:
        """Sample one wave: B conditional rows, then the B unconditional ones where guidance is on."""
        count, steps = len(rows), self._policy.image_tokens
        llama = self._policy.model.model.language_model
        prompts = [row.prompt.conditional for row in rows]
        if rule.guided:
            prompts += [row.prompt.unconditional for row in rows]
        different = list(dict.fromkeys(prompts))
        place = {prompt: index for index, prompt in enumerate(different)}
        owners = torch.tensor([place[prompt] for prompt in prompts], device=self._device)
        ids, padding = self._padded(different)
        seeds = torch.tensor([row.seed for row in rows], device=self._device)
        decoder = StaticDecoder(llama, len(prompts), ids.shape[1] + steps - 1)
        states = decoder.prefill(llama.embed_tokens(ids), padding, owners)
        samples: list[Sample] = []
        for step in range(steps):
            logits = self._policy.head(states)
            unconditional = logits[count:] if rule.guided else None
            samples.append(sample(logits[:count], unconditional, seeds, torch.full_like(seeds, step), rule))
            if step + 1 < steps:
                states = decoder.step(self._image_embeds[samples[-1].tokens].repeat(len(prompts) // count, 1))
        return Rollouts(
            *(
                torch.stack([getattr(item, name) for item in samples], dim=1).cpu()
                for name in ("tokens", "logprobs", "guided_logprobs", "entropy")
            )
        )

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prompts of any lengths as ids int64 [B, P], padded on the left, and the padding of each, int64 [B]."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        return torch.tensor(ids, device=self._device), torch.tensor(padding, device=self._device)
