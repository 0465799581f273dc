"""The suites by name, and one function that runs a suite over an engine and scorers in this process."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stage_ray.config import RewardConfig
from stage_ray.engines.base import ImageEngine
from stage_ray.errors import ConfigError
from stage_ray.evaluation import geneval
from stage_ray.evaluation.result import EvaluationResult
from stage_ray.records import Prompt, RolloutGroup, RolloutRequest, ScoredGroup
from stage_ray.rewards import score_groups
from stage_ray.rewards.base import Reward

GROUPS_PER_PIECE = 16


class Summarise(Protocol):
    """Scored groups of a suite's requests to its result."""

    def __call__(self, prompts: Sequence[Prompt], scored: Sequence[ScoredGroup]) -> EvaluationResult:
        """As `geneval.summarise`."""
        ...


@dataclass(frozen=True, slots=True)
class Suite:
    """A benchmark's protocol, and what it is run with where nothing else is asked for.

    Attributes:
        name: what `suite` and the command line know it by.
        description: one line for a person.
        prompts: location of its prompt file, as in a config.
        rewards: its scorers, as in a config.
        images_per_prompt: as the benchmark defines it.
    """

    name: str
    description: str
    prompts: str
    rewards: tuple[RewardConfig, ...]
    images_per_prompt: int
    requests_for: Callable[[Sequence[Prompt], int, int], list[RolloutRequest]]
    summarise: Summarise


def _config(type_: str, **options: Any) -> RewardConfig:
    return RewardConfig(type=type_, name=None, weight=1.0, options=options)


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="geneval",
            description="GenEval's six tasks over ShapeWorld's held-out prompts, judged by its detector",
            prompts="package:stage_ray/shapeworld/assets/prompts/heldout.jsonl",
            rewards=(
                _config(
                    "geneval",
                    detector="stage_ray.shapeworld.detector.ShapeDetector",
                    threshold=0.5,
                    counting_threshold=0.5,
                ),
            ),
            images_per_prompt=4,
            requests_for=geneval.requests_for,
            summarise=geneval.summarise,
        ),
    )
}


def find_suite(name: str) -> Suite:
    """The suite of a name.

    Raises:
        ConfigError: there is none; names the nearest one.
    """
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(SUITES))}"
        raise ConfigError(f"there is no suite {name!r}; {mend}")
    return SUITES[name]


def evaluate(
    engine: ImageEngine,
    scorers: Sequence[tuple[str, Reward]],
    prompts: Sequence[Prompt],
    *,
    images_per_prompt: int,
    seed: int,
    progress: Callable[[int], object] | None = None,
    seen: Callable[[Sequence[RolloutGroup]], object] | None = None,
    suite: Suite = SUITES["geneval"],
) -> EvaluationResult:
    """Draw and judge every prompt in this process, piece by piece so that pictures do not pile up.

    Args:
        engine: draws the images.
        scorers: as `build_rewards` makes them; one must give GenEval's verdicts, or `overall` is None.
        prompts: what to draw.
        images_per_prompt: images of each.
        seed: fixes every image.
        progress: called with the number of prompts just finished.
        seen: called with the groups just drawn, for who wants the pictures.
        suite: the protocol.
    """
    requests = suite.requests_for(prompts, images_per_prompt, seed)
    scored: list[ScoredGroup] = []
    for start in range(0, len(requests), GROUPS_PER_PIECE):
        groups = engine.generate(requests[start : start + GROUPS_PER_PIECE])
        scored += score_groups(scorers, groups)
        if seen is not None:
            seen(groups)
        if progress is not None:
            progress(len(groups))
    return suite.summarise(prompts, scored)
