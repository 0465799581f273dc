"""What the benches sample and train on: shipped training prompts of equal length, so that nothing needs padding."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from stage_ray.pipeline.prompts import load_prompts
from stage_ray.policies.base import PromptIds
from stage_ray.records import Prompt, RolloutGroup

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


def prompts_of_images(encode: Callable[[str], PromptIds], images: int, group_size: int) -> list[PromptIds]:
    """The prompt of each image, ``group_size`` images a prompt."""
    pairs = equal_prompts(encode, -(-images // group_size))
    return [ids for _, ids in pairs for _ in range(group_size)][:images]


def groups_of(
    prompts: Sequence[Prompt], tokens: np.ndarray, images: np.ndarray, *, codes: int, version: int
) -> list[RolloutGroup]:
    """Tokens int32 [N, G, T] and images uint8 [N, G, H, W, 3] as groups whose log-probabilities are a flat model's."""
    entropy = np.full(tokens.shape[1:], math.log(codes), np.float32)
    seeds = tuple(range(tokens.shape[1]))
    return [
        RolloutGroup(
            number, prompt, seeds, tokens[number], -entropy, -entropy, entropy, images[number], version, "bench", 0.0
        )
        for number, prompt in enumerate(prompts)
    ]
