"""PARM++ (arXiv 2501.13926): PARM, then a judge says what is wrong, and the image is drawn again with that in its text.

The paper trains its model to correct an image by a reflection. Here the reflection joins the prompt, so that any model
can be asked; one that was not trained for it may make little of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from pydantic import Field

from stage_ray.config import RewardConfig
from stage_ray.records import SEARCH, JudgedGroup, RolloutRequest, image_seeds
from stage_ray.samplers.base import Answer, Judge
from stage_ray.samplers.parm import ParmSearch, asking

REFLECTION = (
    "This image was drawn for the prompt: {prompt}\nIf it shows all that the prompt asks for, write only\n"
    "Final Score: 5\nElse write one short sentence that tells the painter what must change, then a line\n"
    "Final Score: X\nwhere X is from 1 (nothing is right) to 4 (nearly all is right)."
)
VERDICT = re.compile(r"\W*final score:.*", re.IGNORECASE | re.DOTALL)


class ParmPlusSearch(ParmSearch):
    """Up to ``rounds`` times, an image that is not right is searched for again, its prompt followed by what is wrong.

    A new image replaces the one before where the outcome is better. ``details`` have under ``search`` also ``round``,
    0 for one that was not redrawn, and ``drawn``, its text.
    """

    rewrites: ClassVar[bool] = True

    reflection: RewardConfig = Field(
        description="Judge that says what is wrong, as one of rewards: its details hold words under said or reason"
    )
    right: float = Field(1.0, description="Score of the reflection from which an image is right")
    rounds: int = Field(3, ge=1, description="Times that an image is redrawn at most")
    words: int = Field(30, ge=1, description="Words of a reflection that join the prompt at most")
    template: str = Field(
        "{prompt}. {reflection}", pattern=r"\{reflection\}", description="What is drawn then; {prompt} is the prompt"
    )

    def judges(self) -> dict[str, RewardConfig]:
        """See `ImageSearch.judges`."""
        return super().judges() | {"reflection": asking(self.reflection, REFLECTION, "points")}

    async def search(self, requests: Sequence[RolloutRequest], judge: Judge) -> list[JudgedGroup]:
        """See `ImageSearch.search`."""
        groups = [_noted(group, 0) for group in await super().search(requests, judge)]
        places = [(row, image) for row, group in enumerate(groups) for image in range(len(group.request.seeds))]
        for number in range(1, self.rounds + 1):
            answers = await judge.ask("reflection", [(groups[row], image) for row, image in places])
            texts = [self._text(requests[row], answer) for (row, _), answer in zip(places, answers, strict=True)]
            places = [place for place, text in zip(places, texts, strict=True) if text]
            if not places:
                break
            again = [
                _again(requests[row], image, text, number)
                for (row, image), text in zip(places, filter(None, texts), strict=True)
            ]
            redrawn = await super().search(again, judge)
            for (row, image), new in zip(places, redrawn, strict=True):
                before, after = self.outcome(groups[row].scored)[image], self.outcome(new.scored)[0]
                if after > before or (math.isnan(before) and not math.isnan(after)):
                    groups[row] = _replaced(groups[row], image, _noted(new, number))
        return groups

    def _text(self, request: RolloutRequest, answer: Answer) -> str:
        """What is drawn next; "" for an image that is right, or of which the judge said nothing."""
        score, said = answer
        words = VERDICT.sub("", str(said.get("said") or said.get("reason") or "")).split()[: self.words]
        if not words or math.isnan(score) or score >= self.right:
            return ""
        return self.template.replace("{prompt}", request.prompt.text).replace("{reflection}", " ".join(words))


def _again(request: RolloutRequest, image: int, text: str, number: int) -> RolloutRequest:
    """Ask for one image of a request with another text, and with seeds that no other round has."""
    seeds = image_seeds(f"reflection:{request.seeds[image]}", number, 1)
    return replace(request, prompt=replace(request.prompt, drawn=text), seeds=seeds)


def _noted(group: JudgedGroup, number: int) -> JudgedGroup:
    """The group, its details with the round and the text that was drawn."""
    more = {"round": number, "drawn": group.request.prompt.drawn_text}
    details = tuple({**said, SEARCH: {**said[SEARCH], **more}} for said in group.scored.details)
    return replace(group, scored=replace(group.scored, details=details))


def _replaced(group: JudgedGroup, image: int, new: JudgedGroup) -> JudgedGroup:
    """The group with the one image of another in the place of one of its own."""

    def put(own: np.ndarray, other: np.ndarray) -> np.ndarray:
        found = own.copy()
        found[image] = other[0]
        return found

    def put_too(own: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
        return None if own is None or other is None else put(own, other)

    old, scored = group.scored, new.scored
    details = (*old.details[:image], scored.details[0], *old.details[image + 1 :])
    features = {name: put(own, scored.features[name]) for name, own in old.features.items()}
    found = replace(
        old,
        scores=put(old.scores, scored.scores),
        valid=put(old.valid, scored.valid),
        details=details,
        features=features,
    )
    images, tokens = put_too(group.images, new.images), put_too(group.tokens, new.tokens)
    return replace(group, scored=found, images=images, tokens=tokens)
