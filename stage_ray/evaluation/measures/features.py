"""Pictures in the feature space of a network that no reward uses: distance to real ones, and diversity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stage_ray.evaluation.measures.base import Measure
from stage_ray.evaluation.measures.frechet import frechet_distance
from stage_ray.evaluation.measures.manifold import inside
from stage_ray.evaluation.metrics import MetricValue, drawn_value, mean_over_images
from stage_ray.records import Prompt, ScoredGroup

DRAWS = 100  # of prompts, for the error of the Fréchet distance
DIVERSITY, FRECHET, PRECISION, RECALL = "diversity", "Frechet distance", "precision", "recall"


class FeaturesMeasure(Measure):
    """By DINOv2: diversity and, where ``reference`` names real pictures, Fréchet distance, precision and recall.

    Diversity is the mean cosine distance, 0..2, of a prompt's images to each other. The error of the Fréchet distance
    is a bootstrap's over prompts, with the reference pictures that stand for them. Those of precision and recall leave
    out that the manifold itself would be another one with other pictures.
    """

    scorer = "vectors"

    def aggregate(self, prompts: Sequence[Prompt], groups: Sequence[ScoredGroup]) -> dict[str, MetricValue]:
        """As `Measure.aggregate`; images whose vectors failed are left out."""
        own, theirs, of_own, of_theirs = _vectors(prompts, groups)
        found: dict[str, MetricValue | None] = {}
        if len(theirs) > 1 and len(own) > 1:
            found[FRECHET] = _frechet(own, theirs, of_own, of_theirs)
            found[PRECISION] = _share(inside(own, theirs), of_own)
            found[RECALL] = _share(inside(theirs, own), of_theirs)
        found[DIVERSITY] = _diversity(own, of_own)
        return {name: value for name, value in found.items() if value is not None}


def _vectors(
    prompts: Sequence[Prompt], groups: Sequence[ScoredGroup]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of images [N, D] and of reference pictures [M, D], each once; prompt index of each, int [N] and [M]."""
    rows, indices = [], []
    for prompt, group in zip(prompts, groups, strict=True):
        for name, features in group.features.items():
            usable = group.valid[:, group.names.index(name)]
            rows.append(features[usable])
            indices += [prompt.index] * int(usable.sum())
    found = np.concatenate(rows) if rows else np.zeros((0, 3), np.float32)
    width, of = (found.shape[1] - 1) // 2, np.asarray(indices, np.int64)
    numbers, first = np.unique(found[:, -1], return_index=True)
    first = first[numbers >= 0]  # -1: there is no reference
    return found[:, :width], found[first, width:-1], of, of[first]


def _frechet(own: np.ndarray, theirs: np.ndarray, of_own: np.ndarray, of_theirs: np.ndarray) -> MetricValue:
    """With the spread over prompts that are drawn anew, for images and reference pictures alike."""
    names = np.unique(of_own)
    noise, draws = np.random.default_rng(0), []
    for _ in range(DRAWS if len(names) > 1 else 0):
        counts = np.bincount(noise.integers(len(names), size=len(names)), minlength=len(names))
        weights = [counts[np.searchsorted(names, of).clip(max=len(names) - 1)] for of in (of_own, of_theirs)]
        if all(weight.sum() > 1 for weight in weights):
            draws.append(frechet_distance(own, theirs, *weights))
    return drawn_value(frechet_distance(own, theirs), draws, len(own), better="smaller")


def _share(held: np.ndarray, of: np.ndarray) -> MetricValue | None:
    return _mean({int(prompt): held[of == prompt].astype(np.float64).tolist() for prompt in np.unique(of)})


def _diversity(own: np.ndarray, of: np.ndarray) -> MetricValue | None:
    """Of prompts with several images; each image counts with its mean distance to the prompt's others."""
    by_prompt = {}
    for prompt in np.unique(of):
        rows = own[of == prompt].astype(np.float64)
        if len(rows) > 1:
            units = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            by_prompt[int(prompt)] = (1 - ((units @ units.T).sum(1) - 1) / (len(rows) - 1)).tolist()
    return _mean(by_prompt)


def _mean(by_prompt: dict[int, list[float]]) -> MetricValue | None:
    return mean_over_images(by_prompt, better="larger")
