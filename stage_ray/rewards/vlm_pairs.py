"""A vision-language model that compares two pictures, for ``win_rate``: Pref-GRPO's judge (arXiv 2508.20751)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Unpack

import numpy as np
from pydantic import Field

from stage_ray.records import Prompt
from stage_ray.rewards.chat import Chat, Endpoint, check_endpoint

QUESTION = (
    "Both images were drawn for the prompt: {prompt}\nWhich one shows what the prompt asks for, and is made, better? "
    "Compare them in a few sentences, then end with one line, which is one of\nImage 1 is better.\nImage 2 is better."
    "\nBoth images are equally good."
)
VERDICTS = {"image 1 is better": 1.0, "image 2 is better": 0.0, "both images are equally good": 0.5}


class VlmPairsReward:
    """Compares two images of one prompt in both orders; the mean counts, so that a liking for the first is no win.

    For ``win_rate`` alone: ``rewards: [{type: win_rate, options: {scorer: vlm_pairs, options: {model: NAME}}}]``.
    UnifiedReward-Think answers in the words that are read here.
    """

    def __init__(
        self,
        model: str,
        question: str = QUESTION,
        swap: bool = True,
        max_tokens: Annotated[int, Field(ge=1)] = 2048,
        **endpoint: Unpack[Endpoint],
    ) -> None:
        """Ask nothing yet; ``swap``: in both orders. The other arguments are those of `VlmJudgeReward`."""
        self._chat = Chat(model, **endpoint)
        self._question, self._swap, self._max_tokens = question, swap, max_tokens

    @classmethod
    def check(cls, prompts: Sequence[Prompt], model: str, **options: Any) -> Iterator[tuple[Prompt, str]]:
        """Check the address without asking it; see `Reward`. It judges every prompt."""
        check_endpoint(options)
        return iter(())

    def compare(self, prompt: Prompt, images_a: np.ndarray, images_b: np.ndarray) -> Sequence[float]:
        """Images uint8 [B, H, W, 3] and [B, H, W, 3] -> how far a is better than b, 0..1; NaN where no order says.

        Raises:
            ServiceUnavailableError: the endpoint is down.
        """
        question = self._question.replace("{prompt}", prompt.text)
        orders = [pair for a, b in zip(images_a, images_b, strict=True) for pair in [(a, b), (b, a)][: 1 + self._swap]]
        said = self._chat.each(lambda pair: self._chat.answer(question, pair, self._max_tokens), orders)
        verdicts = np.asarray([verdict(each) for each in said]).reshape(len(images_a), -1)
        verdicts[:, 1:] = 1 - verdicts[:, 1:]
        counts = (~np.isnan(verdicts)).sum(1)
        return [float(np.nanmean(row)) if count else float("nan") for row, count in zip(verdicts, counts, strict=True)]


def verdict(said: str) -> float:
    """1 where the first image won, 0 where the second did, 0.5 for a tie; NaN where no words say so, the last count."""
    found = re.findall("|".join(VERDICTS), said.lower())
    return VERDICTS[found[-1]] if found else float("nan")
