"""The contract between the learner and a recipe: how scored groups become a loss.

For each update every rank of the learner calls `Recipe.credit` once, with the whole groups of all ranks, then
`Recipe.objective` once for each micro-batch of its own images. Two rules keep any cut into micro-batches and ranks
exact: ``credit`` normalises over whole groups, before anything is cut, and ``objective`` is a plain sum over tokens.
Every term of it is weighed by ``credit.weights`` or ``credit.images``: where groups that are not finite are left out,
copies of others may fill the ranks' shares, and weigh 0.

Letters are those of `stage_ray.algorithm`, and ``B`` images of one micro-batch; log-probabilities are in nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from stage_ray.algorithm.divergence import Divergence
from stage_ray.algorithm.losses import TokenWeights
from stage_ray.algorithm.off_policy import Correction
from stage_ray.config import AlgorithmConfig, RunConfig, Section
from stage_ray.records import RolloutGroup, ScoredGroup


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """N whole groups on the learner's device, the same on every rank; no tensor carries a gradient.

    Attributes:
        groups: the N records as the engine made them: prompts, seeds, images (empty where those go to scorers only).
        scored: theirs from the scorers, with what each scorer said of each image (``details``).
        tokens: int64 [N, G, T], codebook ids.
        logprobs, entropy: float32 [N, G, T], recorded while sampling: conditional branch, temperature 1.
        guided_logprobs, guided_entropy: likewise, of the distribution that the tokens were drawn from.
        scores: float32 [N, G, R], all valid; 0 where a scorer was not asked about a group (``scored[n].unasked``).
        scorers: the R names, in column order.
        scorer_weights: float32 [R].
        staleness: int64 [N], updates between the sampling version and the learner's; 0 is fresh.
        guided: bool [N]: drawn with the config's guidance, or without any (``rollout.unguided_share``).
        features: vectors of the images by the scorer that gave them, float32 [N, G, F] each.
        codebook: float32 [V, D], the vectors as the image decoder gets them.
        grid: (h, w) with h * w = T, image tokens along height and width.
        progress: share of the run's updates that are done, 0 in the first.
        lr_factor: learning rate of this update over ``learner.lr``.
    """

    groups: tuple[RolloutGroup, ...]
    scored: tuple[ScoredGroup, ...]
    tokens: Tensor
    logprobs: Tensor
    guided_logprobs: Tensor
    entropy: Tensor
    guided_entropy: Tensor
    scores: Tensor
    scorers: tuple[str, ...]
    scorer_weights: Tensor
    staleness: Tensor
    guided: Tensor
    features: Mapping[str, Tensor]
    codebook: Tensor
    grid: tuple[int, int]
    progress: float = 0.0
    lr_factor: float = 1.0

    @property
    def moved(self) -> Tensor:
        """Groups that were drawn from a prompt's embeddings moved apart: bool [N]."""
        found = [group.embeds is not None for group in self.groups] or [False] * len(self.staleness)
        return torch.tensor(found, device=self.staleness.device)

    @property
    def off_policy(self) -> Tensor:
        """Groups that another distribution drew than the learner's, of an older version or a moved prompt: bool [N]."""
        return (self.staleness > 0) | self.moved


@dataclass(frozen=True, slots=True)
class ReferenceOutputs:
    """The frozen reference model on the same tokens: float32 [N, G, T] each, or [B, T] of a micro-batch.

    Attributes:
        logprobs, entropy: conditional branch, temperature 1.
        guided_logprobs: under the distribution that is sampled; None unless `Recipe.needs_guided`.
    """

    logprobs: Tensor
    entropy: Tensor
    guided_logprobs: Tensor | None = None

    def take(self, indices: Tensor) -> ReferenceOutputs:
        """Those of a micro-batch: ``indices`` int64 [B], each ``n * G + g``."""
        guided = None if self.guided_logprobs is None else self.guided_logprobs.flatten(0, 1)[indices]  # [B, T]
        return ReferenceOutputs(self.logprobs.flatten(0, 1)[indices], self.entropy.flatten(0, 1)[indices], guided)

    def select(self, groups: Tensor) -> ReferenceOutputs:
        """Those of some groups: int64 [n]."""
        guided = None if self.guided_logprobs is None else self.guided_logprobs[groups]
        return ReferenceOutputs(self.logprobs[groups], self.entropy[groups], guided)


@dataclass(frozen=True, slots=True)
class Credit:
    """What the tokens of a batch are worth; no gradient anywhere.

    Attributes:
        advantages: float [N, G], one an image, or [N, G, T]; [B] or [B, T] of a micro-batch.
        weights: of each token in the policy term and in the KL, normalised over whole groups of the whole batch.
        metrics: of the update, by their names in ``metrics.jsonl``.
        images: float [N, G], or [B]: weight of each image in terms that are not linear in its tokens; None without any.
    """

    advantages: Tensor
    weights: TokenWeights
    metrics: dict[str, float] = field(default_factory=dict)
    images: Tensor | None = None

    def take(self, indices: Tensor) -> Credit:
        """That of a micro-batch: ``indices`` int64 [B], each ``n * G + g``."""
        policy, kl = (weight.flatten(0, 1)[indices] for weight in (self.weights.policy, self.weights.kl))
        images = None if self.images is None else self.images.flatten()[indices]
        return Credit(self.advantages.flatten(0, 1)[indices], TokenWeights(policy, kl), self.metrics, images)


@dataclass(frozen=True, slots=True)
class PolicyOutputs:
    """The current policy on the B images of a micro-batch: float32 [B, T] each.

    Attributes:
        logprobs: with gradient; conditional branch, temperature 1.
        behavior_logprobs: what the ratio of ``logprobs`` is taken against. For a fresh group these are ``logprobs``
            themselves, detached, so the ratio is exactly 1; for an older one as ``algorithm.ratio_on`` says.
        entropy: of the conditional branch; with gradient where `Recipe.needs_entropy_grad`.
        guided_logprobs: under the distribution that is sampled, with the gradient that the policy gives them; may be
            None unless `Recipe.needs_guided`.
        guided_behavior_logprobs: what the ratio of ``guided_logprobs`` is taken against, likewise.
        divergence: of policy and reference over the vocabulary, with gradient; None but for `Recipe.exact_divergence`.
    """

    logprobs: Tensor
    behavior_logprobs: Tensor
    entropy: Tensor
    guided_logprobs: Tensor | None = None
    guided_behavior_logprobs: Tensor | None = None
    divergence: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """The share of a micro-batch in the loss of the whole batch.

    Attributes:
        loss: scalar with gradient, a sum over tokens.
        parts: metrics: scalars, sums over tokens too, under the same names in every call.
    """

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Recipe(ABC):
    """One algorithm: a config's ``recipe`` names it, and ``algorithm`` holds its options beside the shared keys.

    Attributes:
        Options: its own keys of ``algorithm``, checked before a run starts.
        needs_guided: `objective` reads ``guided_logprobs``, at one more forward pass of policy and reference.
        needs_guided_grad: `objective` differentiates ``guided_logprobs``, through both branches.
        needs_entropy_grad: `objective` differentiates the entropy, at a second run of the policy's head.
        bounded: `objective` bounds by itself how far a token's ratio moves, so several updates a batch need no clip.
        exact_divergence: `objective` reads ``divergence`` of this kind, at one more forward pass of the reference.

    Example: `stage_ray.recipes.grpo`.
    """

    Options: ClassVar[type[Section]]
    needs_guided: ClassVar[bool] = False
    needs_guided_grad: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    exact_divergence: Divergence | None = None
    needs_entropy_grad: bool = False

    def __init__(self, options: Any, shared: AlgorithmConfig) -> None:
        """Keep the validated ``options`` (an instance of ``Options``) and the keys that all recipes share."""
        self.options, self.shared = options, shared
        self.correction = correction_of(shared)  # of older groups' ratios

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """Raise a `ConfigError` for a run that the recipe cannot train, such as one with too few scorers."""
        return

    @abstractmethod
    def credit(self, batch: GroupBatch, reference: ReferenceOutputs, step: int) -> Credit:
        """Advantages and token weights of whole groups; ``step`` is the number of updates done, 0 in the first."""

    @abstractmethod
    def objective(self, policy: PolicyOutputs, reference: ReferenceOutputs, credit: Credit) -> Objective:
        """The loss of the B images of a micro-batch, a sum over tokens; all three arguments are of these images."""


def correction_of(algorithm: AlgorithmConfig) -> Correction:
    """What a config does with ratios far from 1."""
    low, high = algorithm.ratio_range
    return Correction(algorithm.correction, cap=algorithm.ratio_cap, low=low, high=high)
