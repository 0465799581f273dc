"""The one loop of every evaluation: requests in batches over whatever generates and scores, then a benchmark's sum."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
import xxhash

from stage_ray.config import OWN_POOL, MeasureConfig, RewardConfig, RunConfig
from stage_ray.evaluation.base import Benchmark, EvaluationResult, summarise
from stage_ray.evaluation.measures.base import measured
from stage_ray.records import MEASURES, JudgedGroup, Prompt, RolloutRequest, image_seeds
from stage_ray.rewards import score_groups
from stage_ray.rewards.routing import Scorer
from stage_ray.samplers import resolve_samplers

if TYPE_CHECKING:
    from stage_ray.engines.base import ImageEngine

T = TypeVar("T")


class Backend(Protocol):
    """Whatever generates and scores: `EngineBackend` in this process, or the cluster of a run.

    Attributes:
        images_per_batch: images of one batch.
        batches_at_once: batches that keep it busy; each holds its images until they are scored.
    """

    images_per_batch: int
    batches_at_once: int

    async def judge(
        self, requests: Sequence[RolloutRequest], *, images: bool, tokens: bool = False
    ) -> list[JudgedGroup]:
        """Generate and score one batch, in the order of the requests; ``images``, ``tokens``: with these themselves."""
        ...

    async def show(self, tokens: np.ndarray, shown: float) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3] of tokens int32 [B, T], grey below this share of their rows."""
        ...


class EngineBackend:
    """An engine and scorers in this process; without scorers it generates only."""

    batches_at_once = 1

    def __init__(
        self, engine: ImageEngine, scorers: Sequence[tuple[str, Scorer]] = (), images_per_batch: int = 64
    ) -> None:
        self._engine, self._scorers, self.images_per_batch = engine, scorers, images_per_batch

    async def judge(
        self, requests: Sequence[RolloutRequest], *, images: bool, tokens: bool = False
    ) -> list[JudgedGroup]:
        """As `Backend.judge`; batches follow each other, and an interrupt takes effect between two of them."""
        await asyncio.sleep(0)  # here the event loop sees a signal
        groups = self._engine.generate(requests)
        judged = zip(requests, score_groups(self._scorers, groups), groups, strict=True)
        return [
            JudgedGroup(request, scored, group.images if images else None, tokens=group.tokens if tokens else None)
            for request, scored, group in judged
        ]

    async def show(self, tokens: np.ndarray, shown: float) -> np.ndarray:
        """As `Backend.show`."""
        return self._engine.decode(torch.from_numpy(tokens).long(), shown).numpy()


def requests_for(prompts: Sequence[Prompt], images_per_prompt: int, seed: int) -> list[RolloutRequest]:
    """One request a prompt, numbered in the order of `prompts`.

    Seeds depend on (seed, prompt.index, image) alone: a selection of the prompts gets the same images as all of them,
    and no image has the noise of one that a run with this seed trains on.
    """
    return [
        RolloutRequest(number, prompt, image_seeds(f"evaluation:{seed}", prompt.index, images_per_prompt))
        for number, prompt in enumerate(prompts)
    ]


async def judge_in_batches(
    backend: Backend,
    requests: Sequence[RolloutRequest],
    use: Callable[[JudgedGroup], T],
    *,
    images: bool = False,
    advance: Callable[[int], object] = lambda groups: None,
    at_once: int | None = None,
) -> list[T]:
    """What ``use`` made of every group, in the order of the requests.

    A group is used as soon as its batch is done; then ``advance`` gets the number of groups. So images do not pile up,
    with ``at_once`` as the most batches that are asked for, unless ``use`` keeps them. Without it all are asked for
    now, and one policy version draws them though training goes on. All requests have as many seeds; ``images`` tells
    whether ``use`` needs the images.
    """
    size = max(1, backend.images_per_batch // len(requests[0].seeds))  # groups of a batch
    room = asyncio.Semaphore(at_once or len(requests))

    async def judge(batch: Sequence[RolloutRequest]) -> list[T]:
        async with room:
            used = [use(group) for group in await backend.judge(batch, images=images)]
        advance(len(used))
        return used

    batches = await asyncio.gather(*(judge(requests[i : i + size]) for i in range(0, len(requests), size)))
    return [group for batch in batches for group in batch]


async def evaluate(
    backend: Backend,
    benchmark: Benchmark,
    requests: Sequence[RolloutRequest],
    advance: Callable[[int], object],
    measures: Sequence[MeasureConfig] = (),
) -> EvaluationResult:
    """Generate and score every prompt of `requests_for`, and sum up; ``advance`` counts the finished ones."""
    judged = await judge_in_batches(
        backend,
        requests,
        lambda group: (group.scored, group.measured),
        advance=advance,
        at_once=backend.batches_at_once,
    )
    prompts, found = [request.prompt for request in requests], [more for _, more in judged if more is not None]
    result = summarise(benchmark, prompts, [scored for scored, _ in judged])
    # Apart from the event loop, on which a cluster's heartbeats depend: some take seconds.
    further = await asyncio.to_thread(measured, measures, prompts, found) if measures else {}
    return result.with_metrics(further)


def judge_of(reward: RewardConfig, *without: str) -> dict[str, Any]:
    """What the scores of a scorer depend on, and its weight but for ``without``; JSON-able.

    A ``when`` that is off is absent, as in results of before it was there.
    """
    return reward.model_dump(mode="json", exclude={*without, *OWN_POOL, *([] if reward.when else ["when"])})


def conditions(
    run: RunConfig,
    benchmark: Benchmark,
    requests: Sequence[RolloutRequest],
    seed: int,
    measures: Sequence[MeasureConfig] = (),
) -> dict[str, Any]:
    """What the result of `evaluate` depends on beside the weights, by key of a config; JSON-able.

    Of prompts, with all that their lines hold, the number and an xxh3-64 in hexadecimal.
    """
    prompts = [(request.prompt.index, request.prompt.text, request.prompt.record) for request in requests]
    digest = xxhash.xxh3_64_hexdigest(json.dumps(prompts, default=str).encode())
    rollout = resolve_samplers(run).rollout
    keys = {"engine", "guidance_scale", "temperature", "top_k", "top_p", "sampler", "sampler_options"}
    # Those that are off are absent, as in results of before they were there.
    keys |= {
        f"{key}{part}" for key in ("prompt_transform", "search") if getattr(rollout, key) for part in ("", "_options")
    }
    keys |= set() if rollout.guidance_schedule == "constant" else {"guidance_schedule", "guidance_end"}
    keys |= set() if rollout.guidance_interval == (0.0, 1.0) else {"guidance_interval"}
    sampling = rollout.model_dump(mode="json", include=keys)
    return {
        "evaluation.benchmark": benchmark.name,
        "evaluation.seed": seed,
        "evaluation.images_per_prompt": len(requests[0].seeds),
        "prompts.heldout": f"{len(prompts)} prompts ({digest})",
        "policy.template": run.policy.template,
        **{f"rollout.{name}": value for name, value in sampling.items()},
        "rewards": [judge_of(reward, "weight") for reward in run.rewards],
        **({MEASURES: [measure.model_dump(mode="json") for measure in measures]} if measures else {}),
    }
