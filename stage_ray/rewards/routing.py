"""Which groups a scorer is asked about: ``rewards[].when``, matched with the line of the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stage_ray.records import Prompt
from stage_ray.rewards.base import GroupReward, Reward


def is_asked(when: Mapping[str, Any] | None, prompt: Prompt) -> bool:
    """Whether the record of a prompt has, under every key of ``when``, its value, or one of its values; None: always.

    Values are compared as texts, since tables hold nothing else.

    Example:
        >>> prompt = Prompt(0, "a cat left of a dog", {"task_type": "spatial", "count": 2})
        >>> is_asked({"task_type": ["spatial", "color"], "count": "2"}, prompt), is_asked({"tag": "spatial"}, prompt)
        (True, False)
    """
    return all(
        key in prompt.record and str(prompt.record[key]) in map(str, wanted if isinstance(wanted, list) else [wanted])
        for key, wanted in (when or {}).items()
    )


@dataclass(frozen=True, slots=True)
class Routed:
    """A scorer that is asked about the groups of some prompts only."""

    scorer: Reward | GroupReward
    when: Mapping[str, Any]


Scorer = Reward | GroupReward | Routed
