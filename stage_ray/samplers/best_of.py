"""Best of N: of several candidates for an image, the one that a scorer judges best (an outcome reward)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stage_ray.records import JudgedGroup, RolloutRequest, ScoredGroup
from stage_ray.samplers.base import ChoosingSearch, Judge, keep


class BestOfSearch(ChoosingSearch):
    """Keeps the candidate with the highest score, the first of equals; one whose score failed is not kept.

    Where all candidates of an image failed, the first one stands for it, with its failed score. ``details`` of a kept
    image have, beside what scorers said, under ``search`` its ``seed``, and how many ``candidates`` ``failed``.
    """

    async def search(self, requests: Sequence[RolloutRequest], judge: Judge) -> list[JudgedGroup]:
        """See `ImageSearch.search`."""
        groups = await judge([self.widen(request) for request in requests])
        return [self._kept(request, group) for request, group in zip(requests, groups, strict=True)]

    def choose(self, scored: ScoredGroup) -> list[int]:
        """See `ChoosingSearch.choose`."""
        scores = self._outcomes(scored)
        best = np.where(np.isnan(scores), -np.inf, scores).argmax(axis=1) + np.arange(len(scores)) * self.candidates
        return best.tolist()

    def _kept(self, request: RolloutRequest, group: JudgedGroup) -> JudgedGroup:
        failed = np.isnan(self._outcomes(group.scored)).sum(axis=1)
        said = [{"candidates": self.candidates, "failed": int(count)} for count in failed]
        return keep(request, group, self.choose(group.scored), said)

    def _outcomes(self, scored: ScoredGroup) -> np.ndarray:
        """Float32 [G, N], NaN where it failed."""
        return self.outcome(scored).reshape(-1, self.candidates)
