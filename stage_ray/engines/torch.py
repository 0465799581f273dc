"""The reference engine: the policy's own modules and a key-value cache, one step at a time. Best for tiny models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.engines.base import ImageEngine, ImageSequence
from stage_ray.engines.sampling import Sample, sample
from stage_ray.errors import ConfigError
from stage_ray.policies import load_policy
from stage_ray.policies.codec import Branch
from stage_ray.policies.decoding import EmbedsPrompts
from stage_ray.policies.devices import compute_dtype, device_for
from stage_ray.records import RECORDED
from stage_ray.samplers import EmbeddingTransform, SamplingParams


class TorchEngine(ImageEngine):
    """Guided sampling where the conditional and unconditional sequence of an image share a batch."""

    def __init__(self, policy: PolicyConfig, rollout: RolloutConfig, *, worker: str) -> None:
        super().__init__(worker, rollout)
        device = device_for(rollout.gpus, "rollout.gpus")
        self._device = device
        self.dtype = compute_dtype(rollout.dtype, device)
        self._policy = load_policy(policy, device=device, dtype=self.dtype, trainable=False)
        self.codec = self._policy.codec
        if isinstance(self._transform, EmbeddingTransform) and not isinstance(self._policy.backbone, EmbedsPrompts):
            raise ConfigError(
                f"rollout.prompt_transform = {rollout.prompt_transform!r} moves the prompts' embeddings, and "
                f"policy.family = {policy.family!r} has none to move; set rollout.prompt_transform=null"
            )
        self._embeds_are_trained = self._trains_image_embeds()
        self._embed_image_tokens()

    def _trains_image_embeds(self) -> bool:
        """Whether an update may change the embeddings of image tokens: a family may train what makes them."""
        trained = list(self._policy.trained_parameters().values())
        try:
            for parameter in trained:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                one = torch.zeros(1, dtype=torch.int64, device=self._device)
                return self._policy.embed_image_tokens(one).requires_grad
        finally:
            for parameter in trained:
                parameter.requires_grad_(False)

    @torch.no_grad()
    def _embed_image_tokens(self) -> None:
        """Embed every image token, once or, where an update may change them, once a version."""
        self._image_embeds = self._policy.embed_image_tokens(torch.arange(self.codebook_size, device=self._device))

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the trained parameters."""
        return {name: tuple(parameter.shape) for name, parameter in self._policy.trained_parameters().items()}

    @torch.no_grad()
    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Take checked tensors, cast to the model's dtype; a CPU reads those that need no cast where they lie."""
        for name, parameter in self._policy.trained_parameters().items():
            if parameter.device.type == "cpu":
                parameter.data = tensors[name].to(parameter.dtype)  # no copy where the dtype is the same
            else:
                parameter.copy_(tensors[name])
        if self._embeds_are_trained:
            self._embed_image_tokens()

    def offload(self) -> None:
        """Move the model to the machine's memory; caches live only as long as a batch."""
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
        del self._policy, self.codec, self._image_embeds

    def moved(self, transform: EmbeddingTransform, branch: Branch, seeds: Sequence[int]) -> Tensor:
        """See `ImageEngine.moved`."""
        backbone = self._policy.backbone
        assert isinstance(backbone, EmbedsPrompts)

        def pool(embeds: Tensor) -> Tensor:
            return backbone.prompt_states(embeds.to(self.dtype)).float().mean(dim=1)

        with torch.no_grad():
            embeds = backbone.embed_prompts([branch])
        with torch.enable_grad():
            return transform.move(embeds, pool, seeds).detach()

    @torch.inference_mode()
    def sample(self, sequences: Sequence[ImageSequence], params: SamplingParams) -> Sample:
        """Sample one generation batch: B conditional sequences, then an unconditional one for each guided image."""
        count, steps = len(sequences), self._policy.image_tokens
        pairs = [image for image, sequence in enumerate(sequences) if params.guided and sequence.guided]
        prompts = [sequence.prompt.conditional for sequence in sequences]
        prompts += [sequences[image].prompt.unconditional for image in pairs]
        owners = torch.tensor([*range(count), *pairs], device=self._device)  # the image of each row
        seeds = torch.tensor([sequence.seed for sequence in sequences], device=self._device)
        mixed, rows, guided = params.guided and len(pairs) < count, owners[:count], None
        if mixed:  # where no unconditional row is, the conditional one stands
            guided = torch.tensor([sequence.guided for sequence in sequences], device=self._device)
            rows = torch.where(guided, count + guided.cumsum(0) - 1, rows)
        # The last token is drawn and never read, so it needs no position.
        decoder = self._policy.decoder(len(prompts), max(map(len, prompts)) + steps - 1)
        embeds = {row: one.embeds for row, one in enumerate(sequences) if one.embeds is not None}
        states = decoder.prefill(prompts, embeds) if embeds else decoder.prefill(prompts)
        samples: list[Sample] = []
        tokens = torch.zeros((count, steps), dtype=torch.int64, device=self._device)
        for step in range(steps):
            logits, positions = self._policy.head(states), torch.full_like(seeds, step)  # [B + guided images, V]
            unconditional = (logits[rows] if mixed else logits[count:]) if params.guided else None
            samples.append(sample(logits[:count], unconditional, seeds, positions, params, tokens, guided))
            tokens[:, step] = samples[-1].tokens
            if step + 1 < steps:
                # Both branches of an image read the token that was drawn for it.
                states = decoder.step(self._image_embeds[tokens[owners, step]])
        records = (torch.stack([getattr(item, name) for item in samples], dim=1).cpu() for name in RECORDED)
        return Sample(tokens.cpu(), *records)
