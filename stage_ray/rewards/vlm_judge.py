"""A vision-language model as a judge, behind any OpenAI-compatible endpoint such as ``vllm serve``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from stage_ray.errors import ConfigError
from stage_ray.records import Prompt
from stage_ray.registry import require_extra
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.chat import PACKAGES, Chat, share_of_yes
from stage_ray.rewards.remote import at_once, finite, require_url

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
        url: str = "http://127.0.0.1:8000/v1",
        mode: Literal["points", "yes_no"] = "points",
        question: str | None = None,
        pattern: str = r"Final Score:\s*([0-9.]+)",
        lowest: float = 1.0,
        highest: float = 5.0,
        max_tokens: Annotated[int, Field(ge=1)] = 512,
        at_once: Annotated[int, Field(ge=1)] = 8,
        requests_per_minute: Annotated[float, Field(gt=0)] | None = None,
        longest_side: Annotated[int, Field(ge=16)] | None = None,
        cache: str | None = None,
        timeout_s: Annotated[float, Field(gt=0)] = 120.0,
        retries: Annotated[int, Field(ge=0)] = 3,
        api_key_env: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        """Ask nothing yet.

        Args:
            model: as the endpoint calls it.
            url: of the endpoint, up to ``/v1``.
            mode: ``points``; or ``yes_no``, for which the endpoint must return log-probabilities.
            question: put in the place of the built-in one; ``{prompt}`` is the prompt.
            pattern: regular expression whose first group is the points; the last match counts.
            lowest, highest: the ends of the points; what lies outside is no score.
            max_tokens: of an answer with points.
            at_once: requests under way.
            requests_per_minute: most of them; null: no limit.
            longest_side: pixels to which larger pictures are reduced.
            cache: a directory that keeps every answer, so that the same question is not asked again.
            timeout_s, retries: of one request, with growing pauses, before the endpoint counts as down.
            api_key_env: name of the environment variable that holds the key, set where reward workers run.
            extra_body: more of each request, such as ``{chat_template_kwargs: {enable_thinking: false}}``.
        """
        _check(url, question, pattern)
        self._chat = Chat(
            model, url, timeout_s, retries, api_key_env, requests_per_minute, longest_side, cache, extra_body or {}
        )
        self._mode, self._question = mode, question or QUESTIONS[mode]
        self._pattern, self._lowest, self._highest = re.compile(pattern), lowest, highest
        self._max_tokens, self._at_once = max_tokens, at_once

    @classmethod
    def check(
        cls,
        prompts: Sequence[Prompt],
        model: str,
        url: str = "http://127.0.0.1:8000/v1",
        question: str | None = None,
        pattern: str = "()",
        **options: Any,
    ) -> Iterator[tuple[Prompt, str]]:
        """Check the options without asking the endpoint; see `Reward`. It judges every prompt."""
        _check(url, question, pattern)
        return iter(())

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt's text.

        Raises:
            ServiceUnavailableError: the endpoint is down.
        """
        pairs = list(zip(images, prompts, strict=True))
        answers = at_once(lambda pair: self._judge(*pair), pairs, self._at_once)
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


def _check(url: str, question: str | None, pattern: str) -> None:
    require_extra(*PACKAGES)
    require_url(url)
    if question is not None and "{prompt}" not in question:
        raise ConfigError("question has no {prompt}: the judge would not know what was asked for")
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(f"pattern = {pattern!r} is no regular expression: {error}") from error
    if groups != 1:
        raise ConfigError(f"pattern = {pattern!r} has {groups} groups, not one around the points")
