"""GenEval as a reward: a detector finds the objects of a picture, `geneval_rules` judges them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from stage_ray.errors import ConfigError, suggest
from stage_ray.records import Prompt
from stage_ray.registry import Registry
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.build import check_options, models_of
from stage_ray.rewards.detection import Detection, Detector
from stage_ray.rewards.geneval_rules import Requirement, requirements, soft_score, strict_verdict, task_of

DETECTORS = Registry("stage_ray.rewards", "Detector", "detector")
Share = Annotated[float, Field(ge=0, le=1)]


class GenEvalReward:
    """Scores by GenEval's rules; the strict verdict is in the details whatever the score is.

    Details of an image: ``verdict`` (bool, strict), ``soft`` (float), ``tag`` (the prompt's task or None) and
    ``reason`` (what is wrong with the image, "" where nothing is); or ``error`` alone where the prompt's record cannot
    be evaluated, and then the score is invalid.

    Example:
        >>> import numpy as np
        >>> from stage_ray.shapeworld.scene import Scene, Shape, render
        >>> reward = GenEvalReward("stage_ray.shapeworld.detector.ShapeDetector")
        >>> picture = render(Scene((Shape("ring", "red", cx=32.0, cy=32.0, size=30.0),)))
        >>> record = {"tag": "single_object", "include": [{"class": "ring", "count": 1}]}
        >>> reward.score(picture[None], [Prompt(0, "a photo of a ring", record)]).details[0]["verdict"]
        True
    """

    def __init__(
        self,
        detector: str = "mask2former",
        score: Literal["soft", "strict", "soft_published"] = "soft",
        threshold: Share = 0.3,
        counting_threshold: Share = 0.9,
        max_per_class: Annotated[int, Field(ge=1)] = 16,
        detector_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the detector.

        Args:
            detector: ``mask2former``, or the dotted path of a `Detector` class of your own.
            score: ``soft``; ``strict`` (0 or 1); or ``soft_published``, soft with the released code's error.
            threshold: confidence above which a detection counts. The defaults are GenEval's.
            counting_threshold: the same, for prompts with the tag ``counting``.
            max_per_class: most confident detections of a class that are looked at.
            detector_options: keyword arguments of the detector.
        """
        kind, options = find_detector(detector, detector_options)
        self._detector: Detector = kind(**options)
        self._score = score
        self._threshold, self._counting_threshold = threshold, counting_threshold
        self._max_per_class = max_per_class

    @classmethod
    def models(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options with the models of the detector; see `models_of`."""
        name = options.get("detector", "mask2former")
        if "." in name:
            return options
        return options | {
            "detector_options": models_of(DETECTORS.find(name, "detector"), options.get("detector_options") or {})
        }

    @classmethod
    def check(
        cls,
        prompts: Sequence[Prompt],
        detector: str = "mask2former",
        detector_options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> Iterator[tuple[Prompt, str]]:
        """The prompts that it could not judge, each with why; see `Reward`. The detector's own `check` comes first."""
        kind, options = find_detector(detector, detector_options)
        if hasattr(kind, "check"):
            kind.check(**options)
        for prompt in prompts:
            try:
                _parse(prompt.record, kind)
            except ValueError as error:
                yield prompt, str(error)

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt's record."""
        seen = self._detector.detect(images)
        details = tuple(self._judge(prompt, found) for prompt, found in zip(prompts, seen, strict=True))
        key = "verdict" if self._score == "strict" else self._score  # verdicts are 0 or 1
        scores = np.asarray([detail.get(key, np.nan) for detail in details], np.float32)  # NaN: could not be judged
        for detail in details:
            detail.pop("soft_published", None)  # a score of its own, and not for people
        return RewardOutput(scores, np.isfinite(scores), details)

    def _judge(self, prompt: Prompt, found: Sequence[Detection]) -> dict[str, Any]:
        try:
            include, exclude, tag = _parse(prompt.record, self._detector)
        except ValueError as error:
            return {"error": f"prompt {prompt.text!r} {error}"}
        threshold = self._counting_threshold if tag == "counting" else self._threshold
        seen: dict[str, list[Detection]] = {}  # class -> its detections
        for one in sorted(found, key=lambda detection: -detection.confidence):  # most confident first
            if one.confidence > threshold:
                seen.setdefault(one.label, []).append(one)
        objects = {label: group[: self._max_per_class] for label, group in seen.items()}
        verdict, reason = strict_verdict(include, exclude, objects)
        return {
            "verdict": verdict,
            "soft": soft_score(include, objects),
            "soft_published": soft_score(include, objects, published=True),
            "tag": tag,
            "reason": reason,
        }


def find_detector(name: str, options: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """The class of a name or dotted path, and its options as its constructor wants them.

    Raises:
        ConfigError: nothing is there, it has no method `detect`, or it does not take the options.
    """
    kind = DETECTORS.find(name, "detector")
    if not callable(kind) or not callable(getattr(kind, "detect", None)):
        raise ConfigError(f"detector {name!r} is no detector: it is not a class with a method detect(images)")
    return kind, check_options(kind, name, options or {}, "detector_options")


def _parse(
    record: Mapping[str, Any], detector: Detector | type[Detector]
) -> tuple[list[Requirement], list[Requirement], str | None]:
    """What a record includes and excludes, and its task, in words that the detector knows.

    Raises:
        ValueError: the record cannot be evaluated, or asks for what the detector never sees.
    """
    try:
        include, exclude, tag = requirements(record, "include"), requirements(record, "exclude"), task_of(record)
    except ValueError as error:
        raise ValueError(f"cannot be judged by GenEval's rules: {error}") from error
    if not include:
        raise ValueError('has no "include": GenEval needs to know what should be seen')
    labels, colors = (getattr(detector, words, None) for words in ("labels", "colors"))  # None: it takes any word
    for key, needs in (("include", include), ("exclude", exclude)):
        for index, need in enumerate(needs):
            for what, word, known in (("class", need.label, labels), ("color", need.color, colors)):
                if known is not None and word is not None and word not in known:
                    fix = suggest(word, known)
                    raise ValueError(f"asks in {key}[{index}] for {what} {word!r}, unknown here; {fix}")
    return include, exclude, tag
