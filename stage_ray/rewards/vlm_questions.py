"""Questions about a picture, from its prompt's record, to a vision-language model behind an OpenAI-like endpoint.

``questions`` of a record is a list of objects: ``question``, asked as it stands; ``answer``, the right word ("yes"
where it is absent), or ``highest``, for a number of points from 0 to it; and ``parents``, the numbers of the questions
without whose yes it makes no sense (the dependency graphs of DSG, arXiv 2310.18235, and DPG-Bench, arXiv 2403.05135).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Unpack

import numpy as np
from pydantic import Field

from stage_ray.records import Prompt
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.chat import Chat, Endpoint, check_endpoint
from stage_ray.rewards.remote import finite

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMERALS = {word: str(number) for number, word in enumerate(WORDS)}


class VlmQuestionsReward:
    """Mean over a prompt's questions, 0..1, those counting 0 of which a parent has 0.

    An answer that cannot be read is no score. Details of an image: ``answers``, 0..1 each before parents are looked at.
    """

    def __init__(
        self,
        model: str,
        mode: Literal["words", "logprobs"] = "words",
        max_tokens: Annotated[int, Field(ge=1)] = 256,
        **endpoint: Unpack[Endpoint],
    ) -> None:
        """Ask nothing yet.

        Args:
            mode: ``words``, an answer is right or not; or ``logprobs``, the probability of the right word as the first
                (Soft-TIFA, arXiv 2512.16853), for which the endpoint must return log-probabilities. Points are read
                from words in both.
            max_tokens: of an answer in words.
            model, endpoint: as of `VlmJudgeReward`.
        """
        self._chat = Chat(model, **endpoint)
        self._soft, self._max_tokens = mode == "logprobs", max_tokens

    @classmethod
    def check(cls, prompts: Sequence[Prompt], model: str, **options: Any) -> Iterator[tuple[Prompt, str]]:
        """The prompts without questions; see `Reward`. The endpoint is not asked."""
        check_endpoint(options)
        for prompt in prompts:
            if wrong := fault(prompt.record):
                yield prompt, wrong

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each by the questions of its prompt's record.

        Raises:
            ServiceUnavailableError: the endpoint is down.
        """
        wrong = [fault(prompt.record) for prompt in prompts]
        asked = [[] if wrong[row] else prompt.record["questions"] for row, prompt in enumerate(prompts)]
        every = [(row, question) for row, questions in enumerate(asked) for question in questions]
        answers = iter(self._chat.each(lambda one: self._ask(images[one[0]], one[1]), every))
        scores, details = list[float | None](), list[dict[str, Any]]()
        for row, questions in enumerate(asked):
            found = [next(answers) for _ in questions]
            read = [answer for answer in found if answer is not None]
            whole = bool(questions) and len(read) == len(found)
            scores.append(float(np.mean(after_parents(questions, read))) if whole else None)
            unread = wrong[row] or "the judge's answer to a question cannot be read"
            details.append({"answers": found} | ({} if whole else {"error": unread}))
        values = finite(scores)
        return RewardOutput(values, np.isfinite(values), tuple(details))

    def _ask(self, image: np.ndarray, question: Mapping[str, Any]) -> float | None:
        text, right = question["question"], str(question.get("answer", "yes")).lower()
        words = {right, NUMERALS.get(right, right)}
        if self._soft and "highest" not in question:
            tokens = self._chat.first_token(text, [image])
            return sum(math.exp(logprob) for token, logprob in tokens.items() if _plain(token) in words)
        said = self._chat.answer(text, [image], self._max_tokens)
        if "highest" in question:
            numbers = re.findall(r"\d+(?:\.\d+)?", said)
            points = float(numbers[-1]) / question["highest"] if numbers else math.inf
            return points if points <= 1 else None
        first = _plain((said.split() or [""])[0])
        readable = first in ("yes", "no") or (bool(first) and right not in ("yes", "no"))
        return float(first in words) if readable else None


def after_parents(questions: Sequence[Mapping[str, Any]], answers: Sequence[float]) -> list[float]:
    """The answers, 0 where a parent's is; parents stand before their children.

    Example:
        >>> after_parents([{}, {"parents": [0]}, {"parents": [1]}, {}], [0.0, 1.0, 1.0, 1.0])
        [0.0, 0.0, 0.0, 1.0]
    """
    found = list(answers)
    for number, question in enumerate(questions):
        if any(found[parent] == 0 for parent in question.get("parents") or ()):
            found[number] = 0.0
    return found


def fault(record: Mapping[str, Any]) -> str:
    """Why a record cannot be judged; "" where it can."""
    questions = record.get("questions")
    if not isinstance(questions, Sequence) or isinstance(questions, str) or not questions:
        return 'has no "questions", a list like [{"question": "Is there a dog? Answer yes or no."}]'
    known = range(len(questions))
    for number, one in enumerate(questions):
        if not isinstance(one, Mapping) or not isinstance(one.get("question"), str):
            return f'has questions[{number}] {one!r:.60}, which is not like {{"question": "Is there a dog?"}}'
        if any(parent not in known for parent in one.get("parents") or ()):
            return f"has questions[{number}] with parents {one['parents']}, and {len(questions)} questions from 0 on"
    return ""


def _plain(token: str) -> str:
    return token.strip("▁Ġ \n\t.,:;!*\"'").lower()  # with what tokenizers and Markdown put around a word
