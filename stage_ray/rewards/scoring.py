"""Runs scorers over whole batches of groups, and lets no failure pass for a score (promise 4)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stage_ray.records import Prompt, RolloutGroup, ScoredGroup
from stage_ray.rewards.base import Reward, RewardOutput

log = logging.getLogger(__name__)


def score_groups(scorers: Sequence[tuple[str, Reward]], groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
    """Score groups with every scorer, one batched call a scorer over all images of all groups.

    A scorer that raises, or answers with the wrong number of scores, gives NaN and ``valid`` False for every image of
    the call; a non-finite score does so for its image. The reason is in ``details[i][name]["error"]``. ``score_s`` of a
    group is its share, by images, of the seconds that the call took.
    """
    if not groups:
        return []
    start = time.monotonic()
    images = np.concatenate([group.images for group in groups])
    prompts = [group.prompt for group in groups for _ in group.images]
    outputs = [_run(name, scorer, images, prompts) for name, scorer in scorers]
    seconds = (time.monotonic() - start) / len(images)
    names = tuple(name for name, _ in scorers)
    scores = np.stack([output.scores for output in outputs], axis=1)
    valid = np.stack([output.valid for output in outputs], axis=1)
    details = [dict(zip(names, said, strict=True)) for said in zip(*(o.details for o in outputs), strict=True)]
    scored, first = [], 0
    for group in groups:
        mine = slice(first, first + len(group.images))
        first = mine.stop
        scored.append(
            ScoredGroup(
                group_id=group.group_id,
                names=names,
                scores=scores[mine],
                valid=valid[mine],
                details=tuple(details[mine]),
                score_s=seconds * len(group.images),
            )
        )
    return scored


def _run(name: str, scorer: Reward, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
    try:
        output = scorer.score(images, prompts)
        scores = np.asarray(output.scores, np.float32)
        valid = np.asarray(output.valid, bool)
        details = [dict(said) for said in output.details]
    # A scorer is a user's code, or a service, and may fail in any way. This is the one place that must outlive it: its
    # failure becomes part of the record, and the group is scored again or replaced.
    except Exception as error:
        log.exception("scorer %s failed on %d images", name, len(images))
        return _failed(len(images), f"{type(error).__name__}: {error}")
    shapes = (scores.shape, valid.shape, (len(details),))
    if shapes != ((len(images),),) * 3:
        got = f"scores {list(scores.shape)}, valid {list(valid.shape)} and {len(details)} details"
        log.error("scorer %s answered %s for %d images", name, got, len(images))
        return _failed(len(images), f"answered {got} for {len(images)} images")
    return _without_made_up_scores(scores, valid, details)


def _failed(count: int, reason: str) -> RewardOutput:
    details = tuple({"error": reason} for _ in range(count))
    return RewardOutput(np.full(count, np.nan, np.float32), np.zeros(count, bool), details)


def _without_made_up_scores(scores: np.ndarray, valid: np.ndarray, details: list[dict[str, Any]]) -> RewardOutput:
    """NaN wherever a score is invalid, invalid wherever it is not finite, and a reason for each."""
    usable = valid & np.isfinite(scores)
    said: list[Mapping[str, Any]] = []
    for detail, score, ok in zip(details, scores, usable, strict=True):
        if not ok and "error" not in detail:
            reason = "the scorer calls it invalid" if np.isfinite(score) else f"the score is {float(score)}"
            detail = {**detail, "error": reason}
        said.append(detail)
    return RewardOutput(np.where(usable, scores, np.nan).astype(np.float32), usable, tuple(said))
