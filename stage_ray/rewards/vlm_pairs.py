"""A vision-language model that compares two pictures, for ``win_rate``: Pref-GRPO's judge (arXiv 2508.20751)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from stage_ray.records import Prompt
from stage_ray.registry import require_extra
from stage_ray.rewards.chat import PACKAGES, Chat
from stage_ray.rewards.remote import at_once, require_url

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
        url: str = "http://127.0.0.1:8000/v1",
        question: str = QUESTION,
        swap: bool = True,
        max_tokens: Annotated[int, Field(ge=1)] = 2048,
        at_once: Annotated[int, Field(ge=1)] = 8,
        requests_per_minute: Annotated[float, Field(gt=0)] | None = None,
        longest_side: Annotated[int, Field(ge=16)] | None = None,
        cache: str | None = None,
        timeout_s: Annotated[float, Field(gt=0)] = 120.0,
        retries: Annotated[int, Field(ge=0)] = 3,
        api_key_env: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        """Ask nothing yet; ``swap``: in both orders. The other arguments are those of `VlmJudgeReward`."""
        require_extra(*PACKAGES)
        require_url(url)
        self._chat = Chat(
            model, url, timeout_s, retries, api_key_env, requests_per_minute, longest_side, cache, extra_body or {}
        )
        self._question, self._swap, self._max_tokens, self._at_once = question, swap, max_tokens, at_once

    @classmethod
    def check(
        cls, prompts: Sequence[Prompt], model: str, url: str = "http://127.0.0.1:8000/v1", **options: Any
    ) -> Iterator[tuple[Prompt, str]]:
        """Check the address without asking it; see `Reward`. It judges every prompt."""
        require_extra(*PACKAGES)
        require_url(url)
        return iter(())

    def compare(self, prompt: Prompt, images_a: np.ndarray, images_b: np.ndarray) -> Sequence[float]:
        """Images uint8 [B, H, W, 3] and [B, H, W, 3] -> how far a is better than b, 0..1; NaN where no order says.

        Raises:
            ServiceUnavailableError: the endpoint is down.
        """
        question = self._question.replace("{prompt}", prompt.text)
        orders = [pair for a, b in zip(images_a, images_b, strict=True) for pair in [(a, b), (b, a)][: 1 + self._swap]]
        said = at_once(lambda pair: self._chat.answer(question, pair, self._max_tokens), orders, self._at_once)
        verdicts = np.asarray([verdict(each) for each in said]).reshape(len(images_a), -1)
        verdicts[:, 1:] = 1 - verdicts[:, 1:]
        counts = (~np.isnan(verdicts)).sum(1)
        return [float(np.nanmean(row)) if count else float("nan") for row, count in zip(verdicts, counts, strict=True)]


def verdict(said: str) -> float:
    """1 where the first image won, 0 where the second did, 0.5 for a tie; NaN where no words say so, the last count."""
    found = re.findall("|".join(VERDICTS), said.lower())
    return VERDICTS[found[-1]] if found else float("nan")
