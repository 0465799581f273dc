"""The three kinds of samplers: a token rule, a prompt transform, a search over images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stage_ray.config import RewardConfig, Section
from stage_ray.records import (
    RECORDED,
    SEARCH,
    JudgedGroup,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    ScoredGroup,
    image_seeds,
)

if TYPE_CHECKING:
    from stage_ray.samplers.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Context:
    """Where in its image each of B tokens stands.

    Attributes:
        positions: int64 [B], 0 for an image's first token.
        sequences: int64 [B, T], the images' tokens; what stands at a token's own position and after it means nothing.
        guided: bool [B], False for images without guidance (``rollout.unguided_share``); None: all have it.
    """

    positions: Tensor
    sequences: Tensor
    guided: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """The tokens so far: int64 [B, T], -1 at each token's own position and after it.

        Example:
            >>> Context(torch.tensor([1, 0]), torch.tensor([[7, 8], [5, 6]])).tokens.tolist()
            [[7, -1], [-1, -1]]
        """
        columns = torch.arange(self.sequences.shape[-1], device=self.sequences.device)
        return self.sequences.masked_fill(columns >= self.positions.unsqueeze(-1), -1)


class ImageTokens(Protocol):
    """What a token rule may ask of a model: its image tokens. A `stage_ray.policies.codec.ImageCodec` is one.

    Attributes:
        grid: image tokens along height and width.
        codebook_size: V, entries of the image codebook.
    """

    grid: tuple[int, int]
    codebook_size: int

    def codebook(self) -> Tensor:
        """Vectors of the image tokens, float32 [V, D], of a model whose image tokenizer is loaded."""


class TokenRule(Section):
    """From logits to the distribution that tokens are drawn from. Its fields are its options, checked by pydantic.

    Engines draw from it and record its log-probabilities and entropy; the learner makes it again from teacher-forced
    logits, some tokens at a time. So `logits` must be differentiable, and a pure function of its arguments, each row by
    itself: that keeps an image a function of its seed and the logits, whatever else is in the batch.

    Example: `stage_ray.samplers.entropy_informed`.
    """

    @abstractmethod
    def logits(
        self, conditional: Tensor, unconditional: Tensor | None, params: SamplingParams, context: Context
    ) -> Tensor:
        """Logits of the distribution, float32 [B, V]; minus infinity for what cannot be drawn.

        Args:
            conditional: float32 [B, V].
            unconditional: float32 [B, V], of an image without guidance its conditional ones; None where
                ``params.guided`` is False.
            params: of the config; `SamplingParams.guide` and `SamplingParams.truncate` apply guidance, top-k and top-p.
            context: of the B tokens.
        """

    def check(self, codec: ImageTokens, *, loaded: bool = False) -> None:  # noqa: B027  not abstract: most fit all
        """Raise a `ConfigError` where it does not fit a model.

        Asked before anything starts, and by each engine once its model is there: only then is the codec ``loaded``,
        so that it has a codebook.
        """


class PromptTransform(Section):
    """From a prompt to the text that images are generated from. Its fields are its options, checked by pydantic.

    An engine asks once a group, and the group carries the answer: the learner takes log-probabilities under what was
    drawn, scorers judge what was asked for.

    Example: `stage_ray.samplers.template`.
    """

    @abstractmethod
    def rewrite(self, prompt: Prompt, seed: int) -> str:
        """The text to generate from: a pure function, so that a group is made again from its prompt and seeds.

        Args:
            prompt: as its file has it; ``record`` is its whole line.
            seed: of the group's first image, for a transform that draws; 0 in the check before a run.
        """

    def apply(self, prompt: Prompt, seed: int) -> Prompt:
        """The prompt with what is drawn for it.

        Raises:
            ValueError: that is empty; names the prompt.
        """
        drawn = self.rewrite(prompt, seed)
        if not drawn.strip():
            raise ValueError(f"{type(self).__name__} makes an empty prompt of {prompt.text[:80]!r}")
        return replace(prompt, drawn=drawn)


class EmbeddingTransform(PromptTransform):
    """From the embeddings of a prompt to those that each image of its group is generated from; the text stays.

    The torch engine alone takes one. A run that trains through it keeps the embeddings with the group and scores its
    tokens under the prompt itself, with ratios against what they were drawn with: off-policy, for the config to accept.

    Example: `stage_ray.samplers.tpso`.
    """

    off_policy: bool = Field(False, description="Let a run train on the images, scored under the prompt as it was")

    @abstractmethod
    def move(self, embeds: Tensor, pool: Callable[[Tensor], Tensor], seeds: Sequence[int]) -> Tensor:
        """Embeddings for G images: float [G, L, hidden].

        A pure function, so that a group is made again from its prompt and seeds: an image depends on all seeds of its
        group, in their order, and on nothing else in the batch.

        Args:
            embeds: of the prompt's conditional branch, as the language model reads it: float [L, hidden].
            pool: the model's view of n such prompts, differentiable: [n, L, hidden] -> float32 [n, hidden], the mean
                over positions of its last hidden states.
            seeds: of the G images.
        """

    def rewrite(self, prompt: Prompt, seed: int) -> str:
        """The prompt's own text."""
        return prompt.text

    def apply(self, prompt: Prompt, seed: int) -> Prompt:
        """The prompt as it is."""
        return prompt


Image: TypeAlias = tuple[JudgedGroup, int]
"""A group that a `Judge` gave, and the place of one image in it."""

Answer: TypeAlias = tuple[float, Mapping[str, Any]]
"""A scorer's score of an image, NaN where it failed, and what else it says (its details)."""


class Judge(Protocol):
    """Draws images and has them scored, wherever engines and scorers are."""

    async def __call__(self, requests: Sequence[RolloutRequest]) -> list[JudgedGroup]:
        """The images of requests with the scores of all scorers; groups in the requests' order."""

    async def ask(self, name: str, images: Sequence[Image], shown: float = 1.0) -> list[Answer]:
        """What one of the search's own judges says of images; answers in the images' order.

        Args:
            name: the option that holds the judge, of `ImageSearch.judges`.
            shown: share of an image's rows that it sees, from the top; the rest is grey.
        """


class ImageSearch(Section):
    """Which images stand for a prompt, out of more that are drawn and scored. Its fields are its options.

    It works in `generate`, `evaluate` and suites. A run trains on the images of a `ChoosingSearch` alone.

    Attributes:
        rewrites: it draws other texts than the prompts, whose lengths are not known before.

    Example: `stage_ray.samplers.best_of`.
    """

    rewrites: ClassVar[bool] = False

    candidates: int = Field(4, ge=1, description="Images drawn for each that is kept")
    scorer: str | None = Field(None, description="Column of the scorer that chooses; null: the first")

    @abstractmethod
    async def search(self, requests: Sequence[RolloutRequest], judge: Judge) -> list[JudgedGroup]:
        """The kept images of each request, one a seed, with their scores; ``judge`` may be asked any number of times.

        Invariants: what is kept for a seed depends on that seed, the prompt and the scorers only, not on the other
        requests. A score that failed is never a reason to keep an image; an image all of whose candidates failed has
        ``valid`` False.
        """

    def judges(self) -> dict[str, RewardConfig]:
        """Judges of its own beside the scorers, by the option that holds each."""
        return {}

    def candidate_seeds(self, seed: int) -> tuple[int, ...]:
        """Seeds of an image's candidates: its own, then a hash of it and a counter; fewer candidates have the first."""
        return (seed, *image_seeds(f"search:{seed}", 0, self.candidates - 1))

    def widen(self, request: RolloutRequest) -> RolloutRequest:
        """A request for the candidates of all images of a request, image after image."""
        return replace(request, seeds=tuple(one for seed in request.seeds for one in self.candidate_seeds(seed)))

    def outcome(self, scored: ScoredGroup) -> np.ndarray:
        """What the scorer that chooses says of each image, float32 [G]; NaN where it failed."""
        # Without a name the first scorer that was asked.
        column = int(scored.asked.argmax()) if self.scorer is None else scored.names.index(self.scorer)
        return np.where(scored.valid[:, column], scored.scores[:, column], np.nan)


class ChoosingSearch(ImageSearch):
    """A search that chooses once, by the candidates' scores alone; so a run can train on what it keeps.

    An image's log-probabilities are those of its tokens and leave the choice out: the gradient is that of another
    distribution than images are drawn from. That is for the config to accept, by ``biased``.

    Example: `stage_ray.samplers.best_of`.
    """

    biased: bool = Field(
        False, description="Let a run train on kept images, whose choice their probabilities leave out"
    )

    @abstractmethod
    def choose(self, scored: ScoredGroup) -> list[int]:
        """The place of each kept image in a group of candidates: the first is one of the first ``candidates``, ..."""

    def kept(self, group: RolloutGroup, scored: ScoredGroup) -> tuple[RolloutGroup, ScoredGroup]:
        """What a run trains on of a group of candidates, all of whose scores are valid."""
        best = self.choose(scored)
        names = ("tokens", "images", *RECORDED, *(["embeds"] if group.embeds is not None else []))
        arrays = {name: getattr(group, name)[best] for name in names}
        seeds = tuple(group.seeds[place] for place in best)
        return replace(group, seeds=seeds, **arrays), take(scored, best)

    def gain(self, candidates: ScoredGroup, kept: ScoredGroup) -> float:
        """By how much the mean score of what was kept is above that of all candidates; 0 where none was asked for."""
        few, all_of_them = self.outcome(kept), self.outcome(candidates)
        return 0.0 if np.isnan(few).any() else float(few.mean() - np.nanmean(all_of_them))


def take(scored: ScoredGroup, places: Sequence[int]) -> ScoredGroup:
    """The scores of some images of a group."""
    chosen = list(places)
    return replace(
        scored,
        scores=scored.scores[chosen],
        valid=scored.valid[chosen],
        details=tuple(scored.details[place] for place in chosen),
        features={name: features[chosen] for name, features in scored.features.items()},
    )


def keep(
    request: RolloutRequest, group: JudgedGroup, places: Sequence[int], said: Sequence[Mapping[str, Any]]
) -> JudgedGroup:
    """The images at ``places`` of a group, as the answer to a request.

    ``details`` of each have, beside what scorers said, ``said`` of it under `SEARCH`.
    """
    kept, best = take(group.scored, places), list(places)
    details = (
        {**of_image, SEARCH: {"seed": group.request.seeds[place], **more}}
        for of_image, place, more in zip(kept.details, best, said, strict=True)
    )
    return replace(
        group,
        request=request,
        scored=replace(kept, details=tuple(details)),
        images=None if group.images is None else group.images[best],
        tokens=None if group.tokens is None else group.tokens[best],
    )
