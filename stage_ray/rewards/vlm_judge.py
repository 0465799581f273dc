"""A vision-language model as a judge, behind any OpenAI-compatible endpoint such as ``vllm serve``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Unpack

import numpy as np
from pydantic import Field

from stage_ray.errors import ConfigError
from stage_ray.records import Prompt
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.chat import Chat, Endpoint, check_endpoint, share_of_yes
from stage_ray.rewards.remote import finite

QUESTIONS = {
    "points": "This image was drawn for the prompt: {prompt}\nHow well does it show what the prompt asks for, and how "
    "well is it made? Think in a sentence or two, then end with a line\nFinal Score: X\nwhere X is from 1 (not at all) "
    "to 5 (perfectly).",
    "yes_no": 'Does this image show "{prompt}"? Answer yes or no.',  # VQAScore's question (arXiv 2404.01291), in short
}


class VlmJudgeReward:
    """Points that the judge writes, brought to 0..1, or its probability of "yes".

    A verdict that cannot be parsed is no score. Details of an image: ``said``, the judge's words, or ``yes``.
    """

    def __init__(
        self,
        model: str,
        mode: Literal["points", "yes_no"] = "points",
        question: str | None = None,
        pattern: str = r"Final Score:\s*([0-9.]+)",
        lowest: float = 1.0,
        highest: float = 5.0,
        max_tokens: Annotated[int, Field(ge=1)] = 512,
        **endpoint: Unpack[Endpoint],
    ) -> None:
        """Ask nothing yet.

        Args:
            model: as the endpoint calls it.
            mode: ``points``; or ``yes_no``, for which the endpoint must return log-probabilities.
            question: put in the place of the built-in one; ``{prompt}`` is the prompt.
            pattern: regular expression whose first group is the points; the last match counts.
            lowest, highest: the ends of the points; what lies outside is no score.
            max_tokens: of an answer with points.
            endpoint: where it is, and how it is asked.
        """
        _check(question, pattern)
        self._chat = Chat(model, **endpoint)
        self._mode, self._question = mode, question or QUESTIONS[mode]
        self._pattern, self._lowest, self._highest = re.compile(pattern), lowest, highest
        self._max_tokens = max_tokens

    @classmethod
    def check(
        cls,
        prompts: Sequence[Prompt],
        model: str,
        question: str | None = None,
        pattern: str = "()",
        **options: Any,
    ) -> Iterator[tuple[Prompt, str]]:
        """Check the options without asking the endpoint; see `Reward`. It judges every prompt."""
        check_endpoint(options)
        _check(question, pattern)
        return iter(())

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt's text.

        Raises:
            ServiceUnavailableError: the endpoint is down.
        """
        pairs = list(zip(images, prompts, strict=True))
        answers = self._chat.each(lambda pair: self._judge(*pair), pairs)
        values = finite([value for value, _ in answers])
        return RewardOutput(values, np.isfinite(values), tuple(details for _, details in answers))

    def _judge(self, image: np.ndarray, prompt: Prompt) -> tuple[float | None, dict[str, Any]]:
        question = self._question.replace("{prompt}", prompt.text)
        if self._mode == "yes_no":
            yes = share_of_yes(self._chat.first_token(question, [image]))
            if yes is None:
                return None, {"error": "the judge's answer begins with neither yes nor no"}
            return yes, {"yes": yes}
        said = self._chat.answer(question, [image], self._max_tokens)
        found = self._pattern.findall(said)
        try:
            points = float(found[-1])
        except (IndexError, ValueError, TypeError):
            return None, {"said": said, "error": "the judge's answer holds no points"}
        if not self._lowest <= points <= self._highest:
            return None, {"said": said, "error": f"{points:g} points are not in {self._lowest:g}..{self._highest:g}"}
        return (points - self._lowest) / (self._highest - self._lowest), {"said": said}


def _check(question: str | None, pattern: str) -> None:
    if question is not None and "{prompt}" not in question:
        raise ConfigError("question has no {prompt}: the judge would not know what was asked for")
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(f"pattern = {pattern!r} is no regular expression: {error}") from error
    if groups != 1:
        raise ConfigError(f"pattern = {pattern!r} has {groups} groups, not one around the points")
