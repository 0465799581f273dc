"""A scorer behind HTTP, for what cannot live in this environment: another Python, another CUDA, another machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from stage_ray.records import Prompt
from stage_ray.registry import require_extra
from stage_ray.rewards.base import RewardOutput, ServiceUnavailableError
from stage_ray.rewards.remote import finite, png_base64, require_url, secret

PACKAGES = ("judge", "httpx", "tenacity")  # the extra and what it brings
BUSY = (429, 500, 502, 503, 504)  # answers that another try may change


class HttpReward:
    """POSTs ``{"prompts": [record with "prompt"], "images": [base64 of a PNG]}`` and reads scores.

    The answer is ``{"scores": [number or null, ...]}``, null for an image without a score, and may hold ``details`` (an
    object an image) and ``features`` (a list of numbers an image). ``rewards/README.md`` has a server.
    """

    def __init__(
        self,
        url: str,
        batch_size: Annotated[int, Field(ge=1)] = 32,
        timeout_s: Annotated[float, Field(gt=0)] = 60.0,
        tries: Annotated[int, Field(ge=1)] = 3,
        api_key_env: str | None = None,
    ) -> None:
        """Ask nothing yet.

        Args:
            url: where to post.
            batch_size: images of one request.
            timeout_s: seconds that one request may take.
            tries: of a request, with growing pauses, before the service counts as down.
            api_key_env: name of the environment variable with a bearer token, set where reward workers run.
        """
        require_extra(*PACKAGES)
        require_url(url)
        import httpx

        token = secret(api_key_env)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._client = httpx.Client(timeout=timeout_s, headers=headers)
        self._url, self._batch_size, self._tries = url, batch_size, tries

    @classmethod
    def check(cls, prompts: Sequence[Prompt], url: str, **options: Any) -> Iterator[tuple[Prompt, str]]:
        """Check the address without asking it; see `Reward`. It judges every prompt."""
        require_extra(*PACKAGES)
        require_url(url)
        return iter(())

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt.

        Raises:
            ServiceUnavailableError: the service is down.
        """
        scores: list[float | None] = []
        details: list[dict[str, Any]] = []
        features: list[list[float]] = []
        for start in range(0, len(images), self._batch_size):
            rows = slice(start, start + self._batch_size)
            answer = self._ask(images[rows], prompts[rows])
            scores += answer["scores"]
            details += answer.get("details") or [{} for _ in answer["scores"]]
            features += answer.get("features") or []
        values = finite(scores)
        return RewardOutput(values, np.isfinite(values), tuple(details), np.asarray(features) if features else None)

    def _ask(self, images: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, Any]:
        import httpx
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

        def passing(error: BaseException) -> bool:
            if isinstance(error, httpx.HTTPStatusError):
                return error.response.status_code in BUSY
            return isinstance(error, httpx.TransportError)

        body = {
            "prompts": [{**prompt.record, "prompt": prompt.text} for prompt in prompts],
            "images": [png_base64(image) for image in images],
        }
        retry = Retrying(
            retry=retry_if_exception(passing),
            stop=stop_after_attempt(self._tries),
            wait=wait_exponential_jitter(initial=0.2, max=5),
            reraise=True,
        )
        try:
            answer = retry(lambda: self._client.post(self._url, json=body).raise_for_status()).json()
        except httpx.HTTPError as error:
            if passing(error):
                raise ServiceUnavailableError(
                    f"{self._url} does not answer ({type(error).__name__}: {error})"
                ) from error
            raise
        if len(answer["scores"]) != len(images):
            raise ValueError(f"{self._url} answered {len(answer['scores'])} scores for {len(images)} images")
        return dict(answer)
