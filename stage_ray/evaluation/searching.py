"""A backend of whose images a search keeps some; its own judges work in this process, wherever images are drawn."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence

import numpy as np

from stage_ray.config import RewardConfig, RolloutConfig, RunConfig, SuiteConfig
from stage_ray.errors import ConfigError, RunError
from stage_ray.evaluation.loop import Backend
from stage_ray.evaluation.pictures import as_group
from stage_ray.records import JudgedGroup, Prompt, RolloutRequest
from stage_ray.rewards import score_groups
from stage_ray.rewards.base import UNAVAILABLE
from stage_ray.rewards.build import build_reward, check_reward
from stage_ray.rewards.routing import Scorer
from stage_ray.samplers import ImageSearch, load_search
from stage_ray.samplers.base import Answer, Image


class SearchBackend:
    """A backend of whose images a search keeps some: for each that is asked for it draws and scores candidates."""

    def __init__(self, backend: Backend, search: ImageSearch, key: str = "rollout") -> None:
        """Build the search's own judges, whose options stand below ``key``."""
        self._backend, self._search = backend, search
        self.images_per_batch = max(1, backend.images_per_batch // search.candidates)
        self.batches_at_once = backend.batches_at_once
        self._judges = {name: build_reward(it, f"{key}.search_options.{name}") for name, it in search.judges().items()}

    async def judge(
        self, requests: Sequence[RolloutRequest], *, images: bool, tokens: bool = False
    ) -> list[JudgedGroup]:
        """As `Backend.judge`."""
        tokens = tokens or bool(self._judges)  # of which they are shown parts
        judge = SearchJudge(self._backend, self._judges, images=images, tokens=tokens)
        return await self._search.search(requests, judge)

    async def show(self, tokens: np.ndarray, shown: float) -> np.ndarray:
        """As `Backend.show`."""
        return await self._backend.show(tokens, shown)


class SearchJudge:
    """A `stage_ray.samplers.base.Judge` over a backend and the judges of a search."""

    def __init__(self, backend: Backend, judges: Mapping[str, Scorer], *, images: bool, tokens: bool) -> None:
        self._backend, self._judges, self._images, self._tokens = backend, judges, images, tokens

    async def __call__(self, requests: Sequence[RolloutRequest]) -> list[JudgedGroup]:
        """As `Judge.__call__`.

        Raises:
            RunError: the model has no room for a text that the search wrote.
        """
        try:
            return await self._backend.judge(requests, images=self._images, tokens=self._tokens)
        except ValueError as error:  # an engine's, of a prompt that is too long
            if any(request.prompt.drawn for request in requests):
                raise RunError(f"{error}; a search wrote that: let it write fewer words") from error
            raise

    async def ask(self, name: str, images: Sequence[Image], shown: float = 1.0) -> list[Answer]:
        """As `Judge.ask`.

        Raises:
            RunError: a service that the judge asks is down.
        """
        if not images:
            return []
        tokens = [group.tokens[place] for group, place in images if group.tokens is not None]
        assert len(tokens) == len(images), "a backend gives tokens where they are asked for"
        pictures = await self._backend.show(np.stack(tokens), shown)  # [B, H, W, 3]
        # A group each: its prompt is all that they share. Scorers may wait for a service, and the loop must not.
        asked = [as_group(group.request.prompt, pictures[i : i + 1]) for i, (group, _) in enumerate(images)]
        scored = await asyncio.to_thread(score_groups, [(name, self._judges[name])], asked)
        details = [one.details[0].get(name, {}) for one in scored]
        if down := next((said["error"] for said in details if UNAVAILABLE in str(said.get("error"))), ""):
            raise RunError(f"search_options.{name}: {down}; start it again, then give the same command")
        scores = [float(one.scores[0, 0]) if one.valid[0, 0] else math.nan for one in scored]
        return list(zip(scores, details, strict=True))


def searching(backend: Backend, run: RunConfig, key: str = "rollout") -> Backend:
    """The backend with the search that ``rollout.search`` names around it; without one the same."""
    search = load_search(run.rollout, [reward.column for reward in run.rewards], key)
    return backend if search is None else SearchBackend(backend, search, key)


def check_search(
    config: RolloutConfig | SuiteConfig, rewards: Sequence[RewardConfig], prompts: Sequence[Prompt], key: str
) -> ImageSearch | None:
    """The search that a section names, its own judges checked without building them; None without one.

    Raises:
        ConfigError: of `load_search` and of the judges, or one of them cannot judge a prompt.
    """
    search = load_search(config, [reward.column for reward in rewards], key)
    for name, judge in (search.judges() if search is not None else {}).items():
        place = f"{key}.search_options.{name}"
        for prompt, why in check_reward(judge, list(prompts), place):
            raise ConfigError(f"{place}: {judge.type} cannot judge {prompt.where or prompt.text[:80]!r}: {why}")
    return search
