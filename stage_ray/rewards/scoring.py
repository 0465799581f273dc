"""Runs scorers over whole batches of groups, and lets no failure pass for a score (promise 4)."""

from __future__ import annotations

import logging
import math
import time
from collections import ChainMap
from collections.abc import Sequence

import numpy as np

from stage_ray.records import RolloutGroup, ScoredGroup
from stage_ray.rewards.base import UNAVAILABLE, GroupReward, Reward, RewardOutput, ServiceUnavailableError
from stage_ray.rewards.routing import Routed, Scorer, is_asked

log = logging.getLogger(__name__)


def score_groups(scorers: Sequence[tuple[str, Scorer]], groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
    """Score groups with every scorer, one batched call a scorer over all images of all groups.

    A scorer that raises, or answers with the wrong number of scores, gives NaN and ``valid`` False for every image of
    the call; a non-finite score does so for its image. The reason is in ``details[i][name]["error"]``. A group that a
    `Routed` scorer is not asked about has NaN and nothing in the details. ``score_s`` of a group is its share, by
    images, of the seconds that the call took.
    """
    if not groups:
        return []
    start = time.monotonic()
    images = np.concatenate([group.images for group in groups])
    outputs = {name: _routed(name, scorer, groups, images) for name, scorer in scorers}
    routes = {name: scorer.when for name, scorer in scorers if isinstance(scorer, Routed)}
    seconds = (time.monotonic() - start) / len(images)  # an image's share
    scores = np.empty((len(images), len(outputs)), np.float32)
    valid = np.empty(scores.shape, bool)
    for column, output in enumerate(outputs.values()):
        scores[:, column], valid[:, column] = output.scores, output.valid
    scored, first = [], 0
    for group in groups:
        last = first + len(group.images)
        mine = slice(first, last)  # its rows of the batch
        unasked = tuple(name for name, when in routes.items() if not is_asked(when, group.prompt))
        vectors = {
            name: output.features[mine]
            for name, output in outputs.items()
            if output.features is not None and name not in unasked
        }
        scored.append(
            ScoredGroup(
                group_id=group.group_id,
                names=tuple(outputs),
                scores=scores[mine],
                valid=valid[mine],
                details=tuple({name: one.details[i] for name, one in outputs.items()} for i in range(first, last)),
                score_s=seconds * len(group.images),
                features=vectors,
                unasked=unasked,
            )
        )
        first = last
    return scored


def merge_scores(parts: Sequence[ScoredGroup], columns: Sequence[str]) -> ScoredGroup:
    """What several pools of scorers said of one group, as one of them would have: in the order of ``columns``."""
    if len(parts) == 1:
        return parts[0]
    names = [name for part in parts for name in part.names]
    order = sorted(range(len(names)), key=lambda i: columns.index(names[i]))
    said = [ChainMap(*map(dict, each)) for each in zip(*(part.details for part in parts), strict=True)]  # an image each
    features = {name: array for part in parts for name, array in part.features.items()}
    ordered = tuple(names[i] for i in order)
    return ScoredGroup(
        group_id=parts[0].group_id,
        names=ordered,
        scores=np.concatenate([part.scores for part in parts], axis=1)[:, order],
        valid=np.concatenate([part.valid for part in parts], axis=1)[:, order],
        details=tuple({name: detail[name] for name in ordered} for detail in said),
        score_s=sum(part.score_s for part in parts),
        features={name: features[name] for name in ordered if name in features},
        unasked=tuple(name for name in ordered if any(name in part.unasked for part in parts)),
    )


def _routed(name: str, scorer: Scorer, groups: Sequence[RolloutGroup], images: np.ndarray) -> RewardOutput:
    """A scorer's answer as `_run` gives it, about all images; NaN, invalid and {} where it is not asked."""
    if not isinstance(scorer, Routed):
        return _run(name, scorer, groups, images)
    asked = [is_asked(scorer.when, group.prompt) for group in groups]
    mine = np.repeat(asked, [len(group.images) for group in groups])  # [B]
    scores, valid = np.full(len(images), np.nan, np.float32), np.zeros(len(images), bool)
    if not mine.any():
        return RewardOutput(scores, valid, ({},) * len(images))
    found = _run(name, scorer.scorer, [group for group, it in zip(groups, asked, strict=True) if it], images[mine])
    scores[mine], valid[mine] = found.scores, found.valid
    said = iter(found.details)
    features = None
    if found.features is not None:
        features = np.full((len(images), found.features.shape[1]), np.nan, np.float32)
        features[mine] = found.features
    return RewardOutput(scores, valid, tuple(next(said) if it else {} for it in mine), features)


def _run(name: str, scorer: Reward | GroupReward, groups: Sequence[RolloutGroup], images: np.ndarray) -> RewardOutput:
    """One scorer's answer: NaN wherever a score is invalid, invalid wherever it is not finite, a reason for each."""
    count = len(images)
    try:
        if isinstance(scorer, GroupReward):
            output = scorer.score_groups(groups)
        else:
            output = scorer.score(images, [group.prompt for group in groups for _ in group.images])
        scores = np.asarray(output.scores, np.float32)
        valid = np.asarray(output.valid, bool)
        details = [dict(said) for said in output.details]  # copies: `error` may be added below
        features = None if output.features is None else np.asarray(output.features, np.float32)
    except ServiceUnavailableError as down:
        log.warning("scorer %s: %s", name, down)
        reason = f"{UNAVAILABLE}: {down}"
    # A scorer is a user's code, or a service, and may fail in any way. This is the one place that must outlive it: its
    # failure becomes part of the record, and the group is scored again or replaced.
    except Exception as error:
        log.exception("scorer %s failed on %d images", name, count)
        reason = f"{type(error).__name__}: {error}"
    else:
        fits = features is None or (features.ndim == 2 and len(features) == count)
        if fits and scores.shape == valid.shape == (len(details),) == (count,):
            known = np.ones(count, bool)  # [B]: the image's features are finite
            if features is not None:
                known &= np.isfinite(features).all(axis=1)
            usable = valid & known & np.isfinite(scores)
            for image in np.flatnonzero(~usable):
                why = "the scorer calls it invalid" if known[image] else "its features are not finite"
                score = float(scores[image])
                details[image].setdefault("error", why if math.isfinite(score) else f"the score is {score}")
            return RewardOutput(np.where(usable, scores, np.nan).astype(np.float32), usable, tuple(details), features)
        shape = "" if features is None else f", features {list(features.shape)}"
        got = f"scores {list(scores.shape)}, valid {list(valid.shape)}{shape} and {len(details)} details"
        log.error("scorer %s answered %s for %d images", name, got, count)
        reason = f"answered {got} for {count} images"
    failed = tuple({"error": reason} for _ in range(count))
    return RewardOutput(np.full(count, np.nan, np.float32), np.zeros(count, bool), failed)
