"""Which prompts the benches draw: the shipped training prompts that are equally long, so that nobody needs padding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice

from stage_ray.pipeline.prompts import load_prompts
from stage_ray.policies.base import PromptIds
from stage_ray.records import Prompt

TRAIN = "package:stage_ray/shapeworld/assets/prompts/train.jsonl"


def equal_prompts(
    encode: Callable[[str], PromptIds], count: int, prompts: Sequence[Prompt] | None = None
) -> list[tuple[Prompt, PromptIds]]:
    """``count`` prompts of the most frequent length in tokens, repeated from the first when they run out.

    Example:
        >>> ids = {"a": PromptIds((1,), (1,)), "b c": PromptIds((1, 2), (1, 2)), "d": PromptIds((3,), (3,))}
        >>> prompts = [Prompt(i, text) for i, text in enumerate(ids)]
        >>> [prompt.text for prompt, _ in equal_prompts(ids.__getitem__, 3, prompts)]
        ['a', 'd', 'a']
    """
    by_length: defaultdict[int, list[tuple[Prompt, PromptIds]]] = defaultdict(list)
    for prompt in prompts or load_prompts(TRAIN):
        ids = encode(prompt.text)
        by_length[len(ids.conditional)].append((prompt, ids))
    chosen = max(by_length.values(), key=len)
    return list(islice((pair for _ in range(count) for pair in chosen), count))
