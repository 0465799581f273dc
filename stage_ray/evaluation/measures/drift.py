"""How far the policy has moved from the reference: KL, exactly over the vocabulary, both ways, and entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stage_ray.evaluation.measures.base import Measure
from stage_ray.evaluation.metrics import MetricValue, mean_over_images
from stage_ray.policies.drift import BACKWARD, ENTROPY, FORWARD
from stage_ray.records import Prompt, ScoredGroup

IMAGES = 2  # of each prompt: a mean over an image's tokens hardly differs from image to image


class DriftMeasure(Measure):
    """KL(policy || reference) on the policy's own images, KL(reference || policy) on the reference's, and entropies.

    Nats a token, of the conditional distribution and, where sampling is guided, of the guided one. The learner runs
    both models over `IMAGES` images of each prompt. The reference's images are those that were drawn before training,
    so there are none where the reference is another model than the policy began as.
    """

    of_learner = True

    def aggregate(self, prompts: Sequence[Prompt], groups: Sequence[ScoredGroup]) -> dict[str, MetricValue]:
        """Of images of the policy's own, whose features are the columns of `stage_ray.policies.drift.token_drift`."""
        found = zip(prompts, groups, strict=True)
        return drift_metrics({p.index: rows for p, group in found for rows in group.features.values()}, {})


def drift_metrics(own: Mapping[int, np.ndarray], reference: Mapping[int, np.ndarray]) -> dict[str, MetricValue]:
    """Metrics from means over tokens, float32 [images, 3 or 6] by prompt, of own images and of the reference's."""
    found: dict[str, MetricValue] = {}
    for prefix, first in (("", 0), ("guided ", 3)):
        for name, images, column, better in (
            ("KL to the reference", own, FORWARD, "smaller"),
            ("KL on reference images", reference, BACKWARD, "smaller"),
            ("entropy drift", own, ENTROPY, "neither"),
        ):
            rows = {
                prompt: values[:, first + column].tolist()
                for prompt, values in images.items()
                if values.shape[1] > first
            }
            if (mean := mean_over_images(rows, better)) is not None:
                found[prefix + name] = mean
    return found
