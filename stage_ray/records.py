"""The records that travel between the rooms: frozen, slotted, without behaviour.

``G`` images a group, ``T`` tokens an image, ``R`` reward functions, ``H x W`` pixels. Arrays are NumPy, so that Ray
hands them over without a copy. A *group* (one prompt, G images) is the unit of everything; it is asked for as a
`RolloutRequest`, sampled as a `RolloutGroup`, scored as a `ScoredGroup`, held by the driver as `GroupRefs`, and trained
in the learner's batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

RECORDED = ("logprobs", "guided_logprobs", "entropy", "guided_entropy")
"""What an engine records of each token beside its id: fields of `RolloutGroup`, float32 [G, T] each."""

MEASURES = "evaluation.measures"
"""Stands for all scorers of a run's measures, where the name of a suite stands for that suite's."""

SEARCH = "search"
"""Stands beside the scorers' names in the details of an image that a search kept."""

CONSTANT_STD = 1e-6
"""A scorer whose unbiased standard deviation in a group is not above this says nothing about that group."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file.

    ``record`` is the whole line as read (GenEval's format: ``tag``, ``include``, ``exclude``, ``prompt``); scorers that
    need only text read ``text``. ``where`` says where it was read, for messages: "prompts.jsonl, line 3". ``index`` is
    unique over all files of ``prompts.train``; ``source`` is the number of the prompt's own among them. ``drawn`` is
    the text that images were generated from, where a prompt transform made another of ``text``.
    """

    index: int
    text: str
    record: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)
    source: int = field(default=0, compare=False)
    drawn: str = ""

    @property
    def drawn_text(self) -> str:
        """What images are generated from; scorers judge ``text``."""
        return self.drawn or self.text


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """Ask for one group: one prompt, one image per seed.

    ``group_id`` grows with admission and is unique in a run; ``seeds`` (each 0 <= seed < 2**63) fix every image wholly.
    ``guided`` is False for a group without guidance, whatever the config's scale.
    """

    group_id: int
    prompt: Prompt
    seeds: tuple[int, ...]
    guided: bool = True


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """What an engine made of one request. Every token of it comes from one policy version.

    Invariants: all arrays share ``G`` and ``T``; log-probabilities are <= 0 and entropies >= 0 up to rounding (nats).

    Attributes:
        tokens: int32 [G, T], codebook ids 0..V-1.
        logprobs: float32 [G, T], log p of each token, *conditional* branch, temperature 1: what STAGE trains.
        guided_logprobs: float32 [G, T], log p of each token under the distribution it was really sampled from
            (guidance, temperature, top-k and top-p applied).
        entropy: float32 [G, T], entropy of the conditional branch at temperature 1.
        guided_entropy: float32 [G, T], entropy of the distribution each token was really sampled from.
        images: uint8 [G, H, W, 3], decoded; H = W = 0 where the pictures travel apart, to scorers only.
        policy_version: the version of the weights that sampled every token.
        guided: as it was asked for: by the config's guidance, or without any (``rollout.unguided_share``).
        embeds: float32 [G, its entries, hidden], what was read in the place of the prompt's conditional branch, where a
            prompt transform moved it apart for each image; None: the branch itself.
    """

    group_id: int
    prompt: Prompt
    seeds: tuple[int, ...]
    tokens: np.ndarray
    logprobs: np.ndarray
    guided_logprobs: np.ndarray
    entropy: np.ndarray
    guided_entropy: np.ndarray
    images: np.ndarray
    policy_version: int
    worker: str
    generate_s: float
    guided: bool = True
    embeds: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """The scores of one group. A failed score is NaN with ``valid`` False, never a number (promise 4).

    So are the scores of a scorer that was not asked about the group; that is no failure.

    Attributes:
        names: the R scorers, in column order.
        scores: float32 [G, R].
        valid: bool [G, R]; ``scores`` is finite wherever it is True.
        details: per image, what each scorer said of it (``details[i][name]``); JSON-able.
        features: vectors of the images by the scorer that gave them, float32 [G, D] each; empty for most scorers.
        unasked: the scorers of ``names`` whose ``when`` leaves the group's prompt out.
    """

    group_id: int
    names: tuple[str, ...]
    scores: np.ndarray
    valid: np.ndarray
    details: tuple[Mapping[str, Any], ...]
    score_s: float
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    unasked: tuple[str, ...] = ()

    @property
    def asked(self) -> np.ndarray:
        """The scorers that were asked about the group, bool [R]."""
        return np.array([name not in self.unasked for name in self.names], bool)


@dataclass(frozen=True, slots=True)
class JudgedGroup:
    """One group of an evaluation.

    Attributes:
        images: uint8 [G, H, W, 3], or None where they were not asked for.
        measured: what the scorers of measures say of it; None without any.
        tokens: int32 [G, T], of which a search shows parts; None where they were not asked for.
    """

    request: RolloutRequest
    scored: ScoredGroup
    images: np.ndarray | None = None
    measured: ScoredGroup | None = None
    tokens: np.ndarray | None = None

    def verdict(self, image: int) -> bool | None:
        """What the first scorer with a ``verdict`` says of an image; None without one."""
        return next((bool(said["verdict"]) for said in self.scored.details[image].values() if "verdict" in said), None)


@dataclass(frozen=True, slots=True)
class GroupRefs:
    """One group as the driver holds it: references to its payload in Ray's object store, never the arrays.

    Attributes:
        tokens: reference to its `RolloutGroup`, whose ``images`` are empty.
        images: reference to its pictures, uint8 [G, H, W, 3]; None once they are no longer needed.
        scores: references to its `ScoredGroup`s, one of each pool of scorers, for `merge_scores`; empty before scoring,
            and where a pool gave no answer.
        error: why the group, or not every score of it, may be used; "" where all may.
        silent: no scorer told its images apart, so there is nothing to learn from it.
        generate_s: seconds that the generation batch took in which the group was sampled.
        mfu: model FLOPs utilisation in that time, 0..1; None where the hardware's peak is not known.
    """

    group_id: int
    policy_version: int
    tokens: Any
    images: Any = None
    scores: tuple[Any, ...] = ()
    error: str = ""
    silent: bool = False
    generate_s: float = 0.0
    mfu: float | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """What one update made: the policy's new version, and the update's metrics."""

    version: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one tensor lies (chunk, first byte in it), and its checksum (xxh3-64 of its bytes, hexadecimal)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunk: int
    start: int
    nbytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """One policy version, whole or not at all (promise 6)."""

    version: int
    tensors: tuple[TensorSpec, ...]
    chunks: int


def drawn_unguided(group: int, share: float) -> bool:
    """Whether a training group is drawn without guidance: of the first n groups ``floor(n share)`` are, evenly spread.

    Example:
        >>> [drawn_unguided(group, 0.5) for group in range(4)]
        [False, True, False, True]
    """
    return math.floor((group + 1) * share) > math.floor(group * share)


def image_seeds(stream: int | str, group: int, count: int) -> tuple[int, ...]:
    """Seeds of a group's images, each in [0, 2**63): a hash of (stream, group, image), whatever ran before.

    Training's stream is the run's seed. Streams of anything else have other names, so that they share no noise with it.
    """
    return tuple(xxhash.xxh3_64_intdigest(f"{stream}:{group}:{i}".encode()) >> 1 for i in range(count))
