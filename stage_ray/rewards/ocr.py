"""OCR as a reward: how much of the quoted text of a prompt can be read in the picture.

``1 - min(d, n) / n``, d the Levenshtein distance of what was read to the target of n characters, both lower case
without spaces, and d = 0 where the target is part of it: 0..1 (STAGE, arXiv 2509.25027; Flow-GRPO, arXiv 2505.05470).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from stage_ray.records import Prompt
from stage_ray.registry import require_extra
from stage_ray.rewards.base import RewardOutput

PACKAGES = ("ocr", "rapidocr", "onnxruntime", "rapidfuzz")  # the extra and what it brings
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class OcrReward:
    """PP-OCRv6 by way of rapidocr, whose wheel has the weights, on the CPU (Apache-2.0; extra ``ocr``).

    The target is the first quoted text of a prompt, or its record's ``target``. Details of an image: ``target``,
    ``read`` (all that was read, from top to bottom) and ``verdict`` (the score is 1).
    """

    def __init__(
        self,
        text_score: Annotated[float, Field(ge=0, le=1)] = 0.5,
        threads: Annotated[int, Field(ge=1)] = 1,
    ) -> None:
        """Load the detector and the recogniser.

        Args:
            text_score: confidence above which a line counts as read.
            threads: of one inference.
        """
        require_extra(*PACKAGES)
        from rapidocr import RapidOCR

        engine = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": threads for kind in ("intra", "inter")}
        logs = {"Global.log_level": "error"}
        self._read = RapidOCR(params={"Global.text_score": text_score, **logs, **engine})

    @classmethod
    def check(cls, prompts: Sequence[Prompt], **options: Any) -> Iterator[tuple[Prompt, str]]:
        """The prompts that name no text to be read; see `Reward`."""
        require_extra(*PACKAGES)
        for prompt in prompts:
            if not normalised(target_of(prompt)):
                yield prompt, 'names no text to be read: put it in double quotes, as in a sign that says "Open"'

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3]; a picture without text scores 0, a prompt without a target nothing."""
        scores = np.full(len(images), np.nan, np.float32)
        details: list[dict[str, Any]] = []
        for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            target = target_of(prompt)
            if not normalised(target):
                details.append({"error": f"prompt {prompt.text!r} names no text to be read"})
                continue
            lines = self._read(np.ascontiguousarray(image[..., ::-1])).txts or ()  # it takes BGR, as OpenCV does
            scores[row] = similarity(" ".join(lines), target)
            details.append({"target": target, "read": " ".join(lines), "verdict": bool(scores[row] == 1)})
        return RewardOutput(scores, np.isfinite(scores), tuple(details))


def target_of(prompt: Prompt) -> str:
    """The text that a picture should show; "" where the prompt names none."""
    if isinstance(target := prompt.record.get("target"), str) and target.strip():
        return target
    quoted = QUOTED.search(prompt.text)
    return (quoted[1] or quoted[2]) if quoted else ""


def normalised(text: str) -> str:
    """Lower case, without white space."""
    return "".join(text.lower().split())


def similarity(read: str, target: str) -> float:
    """The score, 0..1, of what was read.

    Example:
        >>> similarity("We are OPEN", "open"), similarity("oven", "open"), similarity("", "open")
        (1.0, 0.75, 0.0)
    """
    from rapidfuzz.distance import Levenshtein

    read, target = normalised(read), normalised(target)
    if target in read:
        return 1.0
    return 1.0 - min(Levenshtein.distance(read, target), len(target)) / len(target)
