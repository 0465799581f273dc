"""What every engine does around its sampling loop: cut requests into waves, decode, stamp versions, take weights."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stage_ray.engines.sampling import SamplingParams
from stage_ray.policies.base import PromptIds
from stage_ray.records import RolloutGroup, RolloutRequest
from stage_ray.weights.manifest import finite


@dataclass(frozen=True, slots=True)
class ImageSequence:
    """One image to sample.

    Example:
        >>> ImageSequence(PromptIds((1, 5, 9), (1, 0, 9)), seed=7).seed
        7
    """

    prompt: PromptIds
    seed: int


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What one wave of B images gave, on the CPU: tokens int64 [B, T], the rest float32 [B, T] (see `RolloutGroup`)."""

    tokens: Tensor
    logprobs: Tensor
    guided_logprobs: Tensor
    entropy: Tensor


class BatchEngine(ABC):
    """An `ImageEngine` but for its sampling loop.

    Weights change only between calls of `generate`, so every token of an image comes from the version in
    ``policy_version``. An update that is refused changes nothing; one that fails half-way leaves an engine that
    refuses to generate until an update succeeds.
    """

    def __init__(self, worker: str, images_per_batch: int, rule: SamplingParams) -> None:
        self.policy_version = 0
        self.worker = worker
        self.images_per_batch = images_per_batch
        self.rule = rule
        self._whole = True
        self._asleep = False

    @property
    @abstractmethod
    def codebook_size(self) -> int:
        """V: every token it draws is one of 0..V-1."""

    @abstractmethod
    def encode_prompt(self, text: str) -> PromptIds:
        """Prompt to token ids of both branches."""

    @abstractmethod
    def sample(self, rows: Sequence[ImageSequence], rule: SamplingParams) -> Rollouts:
        """Sample one wave."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] -> images uint8 [B, H, W, 3]."""

    @abstractmethod
    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes that an update must bring, all of them."""

    @abstractmethod
    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Put checked tensors in place. They may be read-only."""

    @abstractmethod
    def offload(self) -> None:
        """Free a GPU's memory for others, keep what cannot be made again in the machine's."""

    @abstractmethod
    def onload(self) -> None:
        """Undo `offload`."""

    def sleep(self) -> None:
        """Leave the GPU's memory to others until the next wave or version; nothing is lost."""
        if not self._asleep:
            self.offload()
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self.onload()
            self._asleep = False

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds."""

    def generate(self, requests: Sequence[RolloutRequest], rule: SamplingParams | None = None) -> list[RolloutGroup]:
        """Sample every image of every request, ``images_per_batch`` at a time; groups in the order of the requests.

        ``rule`` replaces the config's for this call (evaluation has a guidance scale of its own).

        Raises:
            RuntimeError: the last weight update failed half-way.
        """
        if not self._whole:
            raise RuntimeError(f"{self.worker} holds half of a weight update; load a whole version before generating")
        self._wake()
        prompts = [self.encode_prompt(request.prompt.text) for request in requests]
        rows = [ImageSequence(p, seed) for p, request in zip(prompts, requests, strict=True) for seed in request.seeds]
        waves: list[tuple[np.ndarray, ...]] = []
        seconds: list[float] = []  # of each image: its share of its wave
        for start in range(0, len(rows), self.images_per_batch):
            began = time.perf_counter()
            wave = self.sample(rows[start : start + self.images_per_batch], rule or self.rule)
            waves.append((*_arrays(wave), self.decode(wave.tokens).numpy()))
            count = len(wave.tokens)
            seconds += [(time.perf_counter() - began) / count] * count
        if not rows:
            return []
        columns = tuple(np.concatenate(parts) for parts in zip(*waves, strict=True))
        return self._groups(requests, columns, seconds)

    def load_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]], *, known_finite: bool = False) -> None:
        """Take new values of the trained tensors, and keep them: nobody may write to them afterwards.

        Raises:
            ValueError: a tensor is unknown, missing, given twice, of another shape, or not finite; nothing changes.
        """
        checked = self._checked(tensors, known_finite)
        self._wake()
        self._whole = False
        self.install(checked)
        self._whole = True
        self.policy_version = version

    def _checked(self, tensors: Iterable[tuple[str, Tensor]], known_finite: bool) -> dict[str, Tensor]:
        shapes = self.weight_shapes()
        found: dict[str, Tensor] = {}
        for name, tensor in tensors:
            if name not in shapes:
                raise ValueError(f"weight update: {name!r} is not a trained tensor of this model")
            if name in found:
                raise ValueError(f"weight update: {name!r} comes twice")
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"weight update: {name!r} is {tuple(tensor.shape)}, this model has {shapes[name]}")
            if not known_finite and not finite(tensor):
                raise ValueError(f"weight update: {name!r} holds values that are not finite")
            found[name] = tensor
        missing = sorted(shapes.keys() - found.keys())
        if missing:
            raise ValueError(f"weight update: {len(missing)} tensors are missing, the first is {missing[0]!r}")
        return found

    def _groups(
        self, requests: Sequence[RolloutRequest], columns: tuple[np.ndarray, ...], seconds: Sequence[float]
    ) -> list[RolloutGroup]:
        groups, start = [], 0
        for request in requests:
            rows = slice(start, start + len(request.seeds))
            tokens, logprobs, guided, entropy, images = (column[rows] for column in columns)
            groups.append(
                RolloutGroup(
                    group_id=request.group_id,
                    prompt=request.prompt,
                    seeds=request.seeds,
                    tokens=tokens,
                    logprobs=logprobs,
                    guided_logprobs=guided,
                    entropy=entropy,
                    images=images,
                    policy_version=self.policy_version,
                    worker=self.worker,
                    generate_s=sum(seconds[rows]),
                )
            )
            start = rows.stop
        return groups


def _arrays(wave: Rollouts) -> tuple[np.ndarray, ...]:
    tokens = wave.tokens.to(torch.int32).numpy()
    return (tokens, *(part.float().numpy() for part in (wave.logprobs, wave.guided_logprobs, wave.entropy)))
