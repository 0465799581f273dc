"""One chat endpoint: questions about pictures, retried, cached, and no faster than it allows."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

import numpy as np
from pydantic import Field

from stage_ray.files import atomic_write, read_json
from stage_ray.registry import require_extra
from stage_ray.rewards.base import ServiceUnavailableError
from stage_ray.rewards.remote import at_once, png_base64, require_url, secret

PACKAGES = ("judge", "openai")  # the extra and what it brings
Item = TypeVar("Item")
Answer = TypeVar("Answer")
TOP = 20  # log-probabilities asked for; the most that OpenAI's own endpoint gives


class Endpoint(TypedDict, total=False):
    """Options that every judge behind an endpoint takes; defaults are those of `Chat`.

    Attributes:
        url: of the endpoint, up to ``/v1``.
        at_once: requests under way.
        requests_per_minute: most of them; null: no limit.
        longest_side: pixels to which larger pictures are reduced.
        cache: a directory that keeps every answer, so that the same question is not asked again.
        timeout_s, retries: of one request, with growing pauses, before the endpoint counts as down.
        api_key_env: name of the environment variable that holds the key, set where reward workers run.
        extra_body: more of each request, such as ``{chat_template_kwargs: {enable_thinking: false}}``.
    """

    url: str
    at_once: Annotated[int, Field(ge=1)]
    requests_per_minute: Annotated[float, Field(gt=0)] | None
    longest_side: Annotated[int, Field(ge=16)] | None
    cache: str | None
    timeout_s: Annotated[float, Field(gt=0)]
    retries: Annotated[int, Field(ge=0)]
    api_key_env: str | None
    extra_body: Mapping[str, Any] | None


def check_endpoint(options: Mapping[str, Any]) -> None:
    """A ConfigError where its client is not installed or the address is none; nothing is asked."""
    require_extra(*PACKAGES)
    if "url" in options:
        require_url(options["url"])


class Chat:
    """Asks a model about pictures, greedily. Safe to use from several threads."""

    def __init__(
        self,
        model: str,
        url: str = "http://127.0.0.1:8000/v1",
        at_once: int = 8,
        requests_per_minute: float | None = None,
        longest_side: int | None = None,
        cache: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 3,
        api_key_env: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        """``model``: as the endpoint calls it; the others: see `Endpoint`."""
        check_endpoint({"url": url})
        from openai import OpenAI

        key = secret(api_key_env) or "none"  # the client wants one, a server of one's own does not
        self._client = OpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=retries)
        self._model, self._url, self._extra, self._longest_side = model, url, dict(extra_body or {}), longest_side
        self._at_once, self._cache = at_once, None if cache is None else Path(cache).expanduser()
        self._gap_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._lock, self._next = threading.Lock(), 0.0

    def each(self, ask: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
        """``ask(item)`` for every item, in their order, some at a time."""
        return at_once(ask, items, self._at_once)

    def answer(self, question: str, images: Sequence[np.ndarray], max_tokens: int) -> str:
        """The words of the answer; images are uint8 [H, W, 3], shown before the question.

        Raises:
            ServiceUnavailableError: the endpoint is down, or refuses for its load.
        """
        return str(self._cached(question, images, self._words, max_tokens=max_tokens))

    def first_token(self, question: str, images: Sequence[np.ndarray]) -> dict[str, float]:
        """Log-probabilities of the likeliest first tokens of the answer; raises as `answer`."""
        options = {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
        return dict(self._cached(question, images, self._logprobs, **options))

    def _words(self, choice: Any) -> str:
        return choice.message.content or ""

    def _logprobs(self, choice: Any) -> dict[str, float]:
        if choice.logprobs is None or not choice.logprobs.content:
            raise ValueError(f"{self._url} gives no log-probabilities, which mode yes_no needs; use mode: points")
        return {one.token: one.logprob for one in choice.logprobs.content[0].top_logprobs}

    def _cached(self, question: str, images: Sequence[np.ndarray], read: Callable[[Any], Any], **options: Any) -> Any:
        """The answer of before where the very same was asked, else a new one, which is kept."""
        pictures = [f"data:image/png;base64,{png_base64(image, self._longest_side)}" for image in images]
        content = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
        request = {
            "model": self._model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            "temperature": 0,
            **options,
        }
        asked = json.dumps([self._url, request, self._extra], sort_keys=True).encode()
        file = None if self._cache is None else self._cache / f"{hashlib.sha256(asked).hexdigest()}.json"
        if file is not None and (known := read_json(file)) is not None:
            return known["answer"]
        answer = read(self._ask(request))
        if file is not None:
            atomic_write(file, json.dumps({"question": question, "answer": answer}))
        return answer

    def _ask(self, request: Mapping[str, Any]) -> Any:
        from openai import APIConnectionError, InternalServerError, RateLimitError

        with self._lock:  # each request has its moment
            now = time.monotonic()
            wait_s, self._next = max(0.0, self._next - now), max(self._next, now) + self._gap_s
        time.sleep(wait_s)
        try:
            return self._client.chat.completions.create(**request, extra_body=self._extra).choices[0]
        except (APIConnectionError, InternalServerError, RateLimitError) as error:  # a time-out is one of the first
            why = " ".join(str(error).split())[:200]
            raise ServiceUnavailableError(f"{self._url} does not answer ({type(error).__name__}: {why})") from error


def share_of_yes(logprobs: Mapping[str, float]) -> float | None:
    """``p(yes) / (p(yes) + p(no))`` over all ways to write them; None where neither is among the likeliest tokens.

    Example:
        >>> import math
        >>> round(share_of_yes({"Yes": math.log(0.5), " yes": math.log(0.1), "No": math.log(0.2), "The": -5.0}), 3)
        0.75
    """
    masses = {"yes": 0.0, "no": 0.0}
    for token, logprob in logprobs.items():
        word = token.strip("▁Ġ \n\t.\"'").lower()  # with what tokenizers put before a word
        if word in masses:
            masses[word] += math.exp(logprob)
    whole = sum(masses.values())
    return masses["yes"] / whole if whole > 0 else None
