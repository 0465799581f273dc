"""Scorers as a user writes them, good and bad: named in test configs by dotted path."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stage_ray.records import Prompt
from stage_ray.rewards.base import RewardOutput, ServiceUnavailableError
from stage_ray.rewards.detection import Detection


def _output(scores: np.ndarray) -> RewardOutput:
    scores = np.asarray(scores, np.float32)
    return RewardOutput(scores, np.isfinite(scores), tuple({} for _ in scores))


class Brightness:
    """Mean of the pixels, 0..1."""

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        return _output(images.mean(axis=(1, 2, 3)) / 255)


class Bright(Brightness):
    """Calls bright pictures right, as GenEval's judge calls those that show what was asked for."""

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        scores = super().score(images, prompts).scores
        details = tuple({"verdict": score > 0.5, "soft": float(score)} for score in scores)  # NumPy's bool
        return RewardOutput(scores, np.ones(len(scores), bool), details)


class Dims(Brightness):
    """A critic: how dark a picture is, and what is wrong with one that is bright."""

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        scores = 1 - super().score(images, prompts).scores
        details = tuple({"reason": "much too bright, use night colours please"} for _ in scores)
        return RewardOutput(scores, np.ones(len(scores), bool), details)


class ShowsMuch(Brightness):
    """Whether the first row of patches is brighter than a number: clear from the start or never."""

    def __init__(self, over: float, rows: int = 8) -> None:
        self.over, self.rows = over, rows

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        return _output(images[:, : self.rows].mean(axis=(1, 2, 3)) / 255 > self.over)


class Down(Brightness):
    """A judge whose service does not answer."""

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        raise ServiceUnavailableError("nobody is at home")


class Constant(Brightness):
    """A scorer that is right, and of no use: every image gets the same."""

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        return _output(np.ones(len(images)))


class Waits(Brightness):
    """Scores nothing until a file exists, so that the run stands still with everything up."""

    def __init__(self, gate: str) -> None:
        self.gate = Path(gate)

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        self.gate.with_suffix(".reached").touch()
        while not self.gate.exists():
            time.sleep(0.1)
        return super().score(images, prompts)


class Slow(Brightness):
    """As a service far away: it takes its time, and leaves the machine to others meanwhile."""

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        time.sleep(0.1)
        return super().score(images, prompts)


class CannotJudge(Brightness):
    """It never scores one prompt."""

    def __init__(self, word: str) -> None:
        self.word = word

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        scores = super().score(images, prompts).scores
        return _output(np.where([self.word in prompt.text for prompt in prompts], np.nan, scores))


class Raises:
    """Never works."""

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        raise OSError("the scoring service is down")


class Faulty(Brightness):
    """Every fault a scorer can have, one after another, each once in a run (files in ``marks`` are left behind)."""

    def __init__(self, marks: str) -> None:
        self.marks = Path(marks)

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        right = super().score(images, prompts)
        fault = next((fault for fault in FAULTS if self._first(fault)), None)
        if fault == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "sleeps":
            time.sleep(3600)
        if fault == "raises":
            raise OSError("the scoring service is down")
        if fault == "answers too few":
            return _output(right.scores[:-1])
        return _output(np.full(len(images), np.nan)) if fault == "answers NaN" else right

    def _first(self, fault: str) -> bool:
        try:
            (self.marks / fault).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


FAULTS = ("answers NaN", "raises", "sleeps", "answers too few", "is killed")


class Blind:
    """A detector that sees nothing, and knows every word."""

    def detect(self, images: np.ndarray) -> list[list[Detection]]:
        return [[] for _ in images]
