"""The share of its group that an image beats: Pref-GRPO's reward (arXiv 2508.20751), over any scorer or pairwise judge.

``R_i = 1 / (G - 1) * sum over j != i of [image i beats image j]``; a tie counts one half for both. Small differences of
scores, which dividing by a group's standard deviation would blow up, so become steps of one size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
from pydantic import Field

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.records import Prompt, RolloutGroup
from stage_ray.rewards.base import GroupReward, Reward, RewardOutput
from stage_ray.rewards.build import METHODS, build_reward, check_reward, with_models
from stage_ray.rewards.scoring import score_groups

KINDS = (*METHODS, "compare(prompt, images_a, images_b)")  # the class inside has one of these methods


@runtime_checkable
class PairwiseJudge(Protocol):
    """Compares images of one prompt two by two, as a vision-language model may. It may have a `check`, as `Reward`."""

    def compare(self, prompt: Prompt, images_a: np.ndarray, images_b: np.ndarray) -> Sequence[float]:
        """Images uint8 [B, H, W, 3] and [B, H, W, 3] -> B numbers in 0..1, how far a is better than b.

        0.5 is a tie; so is NaN, for an answer that cannot be parsed.
        """
        ...


class WinRateReward:
    """Scores an image by the others of its group that it beats, 0..1.

    A judge is asked once about each pair of a group, all pairs in one call. An image without a valid score of the inner
    scorer, or without an answer of the judge about any of its pairs, has no valid win rate.

    Details of an image: those of the inner scorer and its ``score``; none with a judge.
    """

    def __init__(
        self,
        scorer: str,
        options: Mapping[str, Any] | None = None,
        margin: Annotated[float, Field(ge=0)] = 0.0,
    ) -> None:
        """Build what compares the images.

        Args:
            scorer: a scorer as in ``rewards[].type``, or the dotted path of a `PairwiseJudge`.
            options: its keyword arguments.
            margin: scores that differ by no more are a tie; a judge has its own.
        """
        self._inner: Reward | GroupReward | PairwiseJudge = build_reward(_inner(scorer, options), "scorer", KINDS)
        if margin and isinstance(self._inner, PairwiseJudge):
            raise ConfigError(f"margin = {margin:g} is of scores, and {scorer} compares images itself; leave it out")
        self._margin = margin

    @classmethod
    def models(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options with the models of the inner scorer; see `models_of`."""
        inner = with_models(_inner(str(options.get("scorer")), options.get("options")))
        return options | ({"options": inner.options} if inner.options else {})

    @classmethod
    def check(
        cls, prompts: Sequence[Prompt], scorer: str, options: Mapping[str, Any] | None = None, **more: Any
    ) -> list[tuple[Prompt, str]]:
        """What the inner scorer, or the judge, checks; see `Reward`."""
        return check_reward(_inner(scorer, options), prompts, "scorer", KINDS)

    def score_groups(self, groups: Sequence[RolloutGroup]) -> RewardOutput:
        """Win rates of whole groups; features are the inner scorer's, where it gives any."""
        if isinstance(self._inner, PairwiseJudge):
            wins = [_judged(self._inner, group) for group in groups]
            details: list[dict[str, Any]] = [{} for group in groups for _ in group.images]
            features = []
        else:
            scored = score_groups([("scorer", self._inner)], groups)
            wins = [_compared(group.scores[:, 0], self._margin) for group in scored]
            details = [
                {**said["scorer"], **({} if np.isnan(score) else {"score": float(score)})}
                for group in scored
                for said, score in zip(group.details, group.scores[:, 0], strict=True)
            ]
            features = [group.features["scorer"] for group in scored if group.features]
        rates = np.concatenate([_rates(each) for each in wins])
        for detail in (detail for detail, rate in zip(details, rates, strict=True) if np.isnan(rate)):
            detail.setdefault("error", "it could be compared with no other image of its group")
        return RewardOutput(rates, np.isfinite(rates), tuple(details), np.concatenate(features) if features else None)


def _inner(scorer: str, options: Mapping[str, Any] | None) -> RewardConfig:
    return RewardConfig(type=scorer, options=dict(options or {}))


def _compared(scores: np.ndarray, margin: float) -> np.ndarray:
    """Scores [G] -> [G, G], 1 where the image of the row beats that of the column, 0.5 for a tie, NaN without score."""
    ahead = scores[:, None] - scores[None, :]
    return np.where(np.isnan(ahead), np.nan, np.where(np.abs(ahead) <= margin, 0.5, ahead > 0))


def _judged(judge: PairwiseJudge, group: RolloutGroup) -> np.ndarray:
    """A judge's answers about a group, as `_compared`."""
    count = len(group.images)
    first, second = np.triu_indices(count, 1)
    answers = np.asarray(judge.compare(group.prompt, group.images[first], group.images[second]), np.float64)
    if answers.shape != first.shape or (answers < 0).any() or (answers > 1).any():
        raise ValueError(f"the judge answered {answers.tolist()}, not {len(first)} numbers in 0..1")
    wins = np.full((count, count), np.nan)
    wins[first, second], wins[second, first] = answers, 1 - answers
    return wins


def _rates(wins: np.ndarray) -> np.ndarray:
    """Wins [G, G], NaN for what is not known -> win rates, float32 [G]; NaN where nothing is known of an image."""
    others = ~np.eye(len(wins), dtype=bool)
    unknown = np.isnan(wins)
    points = np.where(unknown, 0.5, wins).sum(axis=1, where=others)
    known = (~unknown & others).any(axis=1)
    return np.where(known, points / max(1, len(wins) - 1), np.nan).astype(np.float32)
