"""Best of N: of several candidates for an image, the one that a scorer judges best (an outcome reward)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stage_ray.records import JudgedGroup, RolloutRequest
from stage_ray.samplers.base import ImageSearch, Judge


class BestOfSearch(ImageSearch):
    """Keeps the candidate with the highest score, the first of equals; one whose score failed is not kept.

    Where all candidates of an image failed, the first one stands for it, with its failed score. ``details`` of a kept
    image have, beside what scorers said, under ``search`` its ``seed``, and how many ``candidates`` ``failed``.
    """

    async def search(self, requests: Sequence[RolloutRequest], judge: Judge) -> list[JudgedGroup]:
        """See `ImageSearch.search`."""
        wider = [
            replace(request, seeds=tuple(one for seed in request.seeds for one in self.candidate_seeds(seed)))
            for request in requests
        ]
        return [self._kept(request, group) for request, group in zip(requests, await judge(wider), strict=True)]

    def _kept(self, request: RolloutRequest, group: JudgedGroup) -> JudgedGroup:
        scored = group.scored
        # Without a name the first scorer that was asked.
        column = int(scored.asked.argmax()) if self.scorer is None else scored.names.index(self.scorer)
        valid = scored.valid[:, column].reshape(-1, self.candidates)  # [G, N]
        scores = np.where(valid, scored.scores[:, column].reshape(valid.shape), -np.inf)
        best = scores.argmax(axis=1) + np.arange(len(valid)) * self.candidates  # [G], among all candidates
        details = tuple(
            {
                **scored.details[which],
                "search": {
                    "seed": group.request.seeds[which],
                    "candidates": self.candidates,
                    "failed": int((~valid[image]).sum()),
                },
            }
            for image, which in enumerate(best.tolist())
        )
        kept = replace(
            scored,
            scores=scored.scores[best],
            valid=scored.valid[best],
            details=details,
            features={name: features[best] for name, features in scored.features.items()},
        )
        return replace(group, request=request, scored=kept, images=None if group.images is None else group.images[best])
