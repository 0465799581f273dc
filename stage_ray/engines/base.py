"""What an image engine is: requests in, groups out, all at one policy version. Its sampling loop is a subclass's."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stage_ray.config import RolloutConfig
from stage_ray.engines.sampling import Sample
from stage_ray.policies.codec import Branch, ImageCodec, PromptIds
from stage_ray.records import RECORDED, RolloutGroup, RolloutRequest
from stage_ray.samplers import EmbeddingTransform, SamplingParams, load_transform
from stage_ray.weights.manifest import finite

GREY = 128  # of rows that are not shown


@dataclass(frozen=True, slots=True)
class ImageSequence:
    """One image to sample.

    Attributes:
        guided: False for one without guidance, which needs no unconditional branch.
        embeds: what is read in the place of the conditional branch, float [its entries, hidden]; None: the branch.
    """

    prompt: PromptIds
    seed: int
    guided: bool = True
    embeds: Tensor | None = None


class ImageEngine(ABC):
    """Guided sampling of autoregressive image tokens.

    Sampling is replayable: token t of an image with seed s depends on (s, t), the logits and the tokens before it only.
    Weights change only between calls of `generate`, so every token of an image comes from the version in
    ``policy_version``. An update that is refused changes nothing; one that fails half-way leaves an engine that refuses
    to generate until an update succeeds.

    Attributes (set by a subclass):
        codec: prompts and pictures of the policy that it serves.
        dtype: of the trained tensors that it holds; it casts what `load_weights` brings.
    """

    codec: ImageCodec
    dtype: torch.dtype = torch.float32

    def __init__(self, worker: str, rollout: RolloutConfig) -> None:
        self.policy_version = 0
        self.worker = worker
        self.images_per_batch = rollout.images_per_batch
        self.params, self._transform = SamplingParams.of(rollout), load_transform(rollout)
        self._complete = True  # False while a weight update is under way, and after one that failed
        self._asleep = False

    @abstractmethod
    def sample(self, sequences: Sequence[ImageSequence], params: SamplingParams) -> Sample:
        """Sample one generation batch; [B, T] on the CPU."""

    @abstractmethod
    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes that an update must bring, all of them."""

    @abstractmethod
    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Put checked tensors in place. They may be read-only."""

    @abstractmethod
    def offload(self) -> None:
        """Free a GPU's memory for others; keep what cannot be made again in the machine's memory."""

    @abstractmethod
    def onload(self) -> None:
        """Undo `offload`."""

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds."""

    def moved(self, transform: EmbeddingTransform, branch: Branch, seeds: Sequence[int]) -> Tensor:
        """What ``transform`` makes of a prompt's conditional branch, float [G, its entries, hidden].

        An engine that has none is one that `load_transform` refuses.
        """
        raise NotImplementedError

    @property
    def codebook_size(self) -> int:
        """V: every token it draws is one of 0..V-1."""
        return self.codec.codebook_size

    def encode_prompt(self, text: str) -> PromptIds:
        """Both branches of a prompt."""
        return self.codec.encode_prompt(text)

    def decode(self, tokens: Tensor, shown: float = 1.0) -> Tensor:
        """Tokens int64 [B, T] -> images uint8 [B, H, W, 3], grey below the ``shown`` share of their rows.

        Another thread may sample or take a version meanwhile: what a picture is made of is never trained.
        """
        if shown >= 1:
            return self.codec.decode(tokens)
        rows, _ = self.codec.grid
        kept = max(1, round(shown * rows))
        raster = tokens.unflatten(1, self.codec.grid).clone()
        raster[:, kept:] = raster[:, kept - 1 : kept]  # the last row goes on, so that its pixels see no edge
        images = self.codec.decode(raster.flatten(1))
        images[:, images.shape[1] * kept // rows :] = GREY
        return images

    def sleep(self) -> None:
        """Leave a GPU's memory to others until the next batch or version; nothing is lost."""
        if not self._asleep:
            self.offload()
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self.onload()
            self._asleep = False

    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams | None = None, *, pictures: bool = True
    ) -> list[RolloutGroup]:
        """Sample every image of every request, ``images_per_batch`` at a time; groups in the order of the requests.

        A group's ``prompt`` says what was drawn. ``params`` replace the config's for this call. Without ``pictures``
        a group's ``images`` are [G, 0, 0, 3], for `decode` to make.

        Raises:
            RuntimeError: the last weight update failed half-way.
            ValueError: a prompt transform made an empty prompt, or one is too long.
        """
        if not self._complete:
            raise RuntimeError(f"{self.worker} holds half of a weight update; load a whole version before generating")
        self._wake()
        if (transform := self._transform) is not None:
            # What a search has written is drawn as it is.
            requests = [
                one if one.prompt.drawn else replace(one, prompt=transform.apply(one.prompt, one.seeds[0]))
                for one in requests
            ]
        sequences = [sequence for request in requests for sequence in self._sequences(request)]
        if not sequences:
            return []
        batches: list[tuple[np.ndarray, ...]] = []
        seconds: list[float] = []  # of each image: its share of its batch
        for start in range(0, len(sequences), self.images_per_batch):
            began = time.perf_counter()
            drawn = self.sample(sequences[start : start + self.images_per_batch], params or self.params)
            records = [getattr(drawn, name).float() for name in RECORDED]
            count = len(drawn.tokens)
            images = self.decode(drawn.tokens) if pictures else torch.empty((count, 0, 0, 3), dtype=torch.uint8)
            arrays = (drawn.tokens.to(torch.int32), *records, images)
            batches.append(tuple(array.numpy() for array in arrays))  # tokens, records, images: each [B, ...]
            seconds += [(time.perf_counter() - began) / count] * count
        columns = tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))  # the same over all batches
        moved = [sequence.embeds for sequence in sequences]
        return self._groups(requests, columns, seconds, moved)

    def _sequences(self, request: RolloutRequest) -> Iterator[ImageSequence]:
        """One an image."""
        prompt, embeds = self.encode_prompt(request.prompt.drawn_text), None
        if isinstance(self._transform, EmbeddingTransform):
            embeds = self.moved(self._transform, prompt.conditional, request.seeds)
        for image, seed in enumerate(request.seeds):
            yield ImageSequence(prompt, seed, request.guided, None if embeds is None else embeds[image])

    def load_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]], *, known_finite: bool = False) -> None:
        """Take new values of the trained tensors between batches, named as in the policy's ``state_dict``.

        The engine may keep them, and does not write to them; neither may the caller. With ``known_finite``, it does not
        look whether they are finite.

        Raises:
            ValueError: a tensor is unknown, missing, given twice, of another shape, or not finite; nothing changes.
        """
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
        missing = sorted(shapes.keys() - found.keys())  # an update is whole or refused
        if missing:
            raise ValueError(f"weight update: {len(missing)} tensors are missing, the first is {missing[0]!r}")
        self._wake()
        self._complete = False  # `install` may fail half-way
        self.install(found)
        self._complete = True
        self.policy_version = version

    def _groups(
        self,
        requests: Sequence[RolloutRequest],
        columns: tuple[np.ndarray, ...],
        seconds: Sequence[float],
        moved: Sequence[Tensor | None],
    ) -> list[RolloutGroup]:
        groups, start = [], 0
        for request in requests:
            own = slice(start, start + len(request.seeds))  # the request's images
            embeds = [one.float().cpu() for one in moved[own] if one is not None]  # of all of them, or of none
            tokens, *records, images = (column[own] for column in columns)
            groups.append(
                RolloutGroup(
                    group_id=request.group_id,
                    prompt=request.prompt,
                    seeds=request.seeds,
                    tokens=tokens,
                    **dict(zip(RECORDED, records, strict=True)),
                    images=images,
                    policy_version=self.policy_version,
                    worker=self.worker,
                    generate_s=sum(seconds[own]),
                    guided=request.guided,
                    embeds=torch.stack(embeds).numpy() if embeds else None,
                )
            )
            start = own.stop
        return groups
