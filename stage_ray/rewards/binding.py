"""Whether exactly what a prompt names is there: each object with its own attributes, relative sizes, the paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stage_ray.errors import ConfigError
from stage_ray.records import Prompt
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.detection import Detection
from stage_ray.rewards.geneval import GenEvalReward, find_detector

LARGER = 1.15  # side of a large object's box over a small one's, at least


class BindingReward(GenEvalReward):
    """GenEval's strict verdict and more, 0 or 1: no object beside those asked for, sizes, background.

    Reads two keys that GenEval's rules ignore: a clause's ``size``, ``large`` or ``small``, relative to the other
    clauses', and the record's ``background``. The detector needs a method ``backgrounds(images)``, which names one for
    each image. Details are those of `GenEvalReward` without a soft score.
    """

    @classmethod
    def check(
        cls,
        prompts: Sequence[Prompt],
        detector: str = "mask2former",
        detector_options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> Iterator[tuple[Prompt, str]]:
        """As `GenEvalReward.check`; and the detector must name backgrounds."""
        if not callable(getattr(find_detector(detector, detector_options)[0], "backgrounds", None)):
            raise ConfigError(f"detector {detector!r} has no method backgrounds(images), which this scorer asks")
        return super().check(prompts, detector, detector_options, **others)

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt's record."""
        found, papers = self._detector.detect(images), self._detector.backgrounds(images)  # type: ignore[attr-defined]
        details = tuple(map(self._exactly, prompts, found, papers))
        scores = np.asarray([detail.get("verdict", np.nan) for detail in details], np.float32)
        return RewardOutput(scores, np.isfinite(scores), details)

    def _exactly(self, prompt: Prompt, found: Sequence[Detection], paper: str) -> dict[str, Any]:
        judged = self._judge(prompt, found)
        if "error" in judged:
            return judged
        sure = [one for one in found if one.confidence > self._threshold]
        faults = [judged["reason"]] if judged["reason"] else []
        clauses = prompt.record["include"]
        if len(sure) != (asked := sum(int(clause.get("count", 1)) for clause in clauses)):
            faults.append(f"expected {asked} objects, found {len(sure)}")
        if (wanted := prompt.record.get("background")) not in (None, paper):
            faults.append(f"expected {wanted} paper, found {paper}")
        sides: dict[str, list[float]] = {"small": [], "large": []}
        for clause in clauses:
            sides.get(clause.get("size"), []).extend(_side(one) for one in sure if one.label == clause["class"])
        if sides["small"] and sides["large"] and min(sides["large"]) < LARGER * max(sides["small"]):
            faults.append(f"expected {min(sides['large']):.0f} pixels well above {max(sides['small']):.0f}")
        return {"verdict": not faults, "tag": judged["tag"], "reason": "; ".join(faults)}


def _side(one: Detection) -> float:
    """Longer side of its box, pixels."""
    left, top, right, bottom = one.box
    return max(right - left, bottom - top)
