"""Best of N: of several candidates for an image, the one that a scorer judges best (an outcome reward)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stage_ray.records import JudgedGroup, RolloutRequest
from stage_ray.samplers.base import ImageSearch, Judge, keep


class BestOfSearch(ImageSearch):
    """Keeps the candidate with the highest score, the first of equals; one whose score failed is not kept.

    Where all candidates of an image failed, the first one stands for it, with its failed score. ``details`` of a kept
    image have, beside what scorers said, under ``search`` its ``seed``, and how many ``candidates`` ``failed``.
    """

    async def search(self, requests: Sequence[RolloutRequest], judge: Judge) -> list[JudgedGroup]:
        """See `ImageSearch.search`."""
        groups = await judge([self.widen(request) for request in requests])
        return [self._kept(request, group) for request, group in zip(requests, groups, strict=True)]

    def _kept(self, request: RolloutRequest, group: JudgedGroup) -> JudgedGroup:
        scores = self.outcome(group.scored).reshape(-1, self.candidates)  # [G, N]
        failed = np.isnan(scores)
        best = np.where(failed, -np.inf, scores).argmax(axis=1) + np.arange(len(scores)) * self.candidates
        said = [{"candidates": self.candidates, "failed": int(count)} for count in failed.sum(axis=1)]
        return keep(request, group, best.tolist(), said)
