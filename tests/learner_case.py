"""A learner on a tiny Janus model, and groups sampled from it the slow, plain way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stage_ray.config import RunConfig
from stage_ray.config.load import validate_config
from stage_ray.learner.learner import Learner
from stage_ray.policies.base import Policy
from stage_ray.policies.logprobs import token_logprobs
from stage_ray.records import Prompt, RolloutGroup, ScoredGroup

PROMPTS = ("a photo of a red circle", "a photo of two green squares and a blue ring", "a photo of a ring")


def tiny_run(model: Path, **sections: Any) -> RunConfig:
    """A run on the model, bfloat16 off; sections such as ``learner={"lr": 1e-3}`` go on top."""
    data: dict[str, Any] = {
        "steps": 10,
        "prompts": {"train": "unused"},
        "policy": {"path": str(model)},
        "rewards": [{"type": "geneval"}],
        "evaluation": {"enabled": False},
        "learner": {"lr": 1e-3, "autocast": "off", "micro_batch_images": 8},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section} if isinstance(section, dict) else section
    return validate_config(data)


@torch.no_grad()
def move_weights(policy: Policy) -> None:
    """Give trained tensors other values, the same at each call."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trained_parameters().values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def sample_groups(
    policy: Policy, prompts: Sequence[str], group_size: int, *, version: int = 0, seed: int = 0
) -> list[RolloutGroup]:
    """Sample token after token, every logit from a full forward: slow, and nothing to get wrong."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for index, text in enumerate(prompts):
        ids = [policy.codec.encode_prompt(text).conditional] * group_size
        tokens = torch.zeros(group_size, policy.image_tokens, dtype=torch.int64)
        for place in range(policy.image_tokens):
            logits = policy.image_logits(ids, tokens)[:, place].float()
            tokens[:, place] = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
        statistics = token_logprobs(policy.image_logits(ids, tokens), tokens)
        groups.append(make_group(index, text, tokens, statistics.logprobs, statistics.entropy, version))
    return groups


def make_group(
    group_id: int, text: str, tokens: torch.Tensor, logprobs: torch.Tensor, entropy: torch.Tensor, version: int
) -> RolloutGroup:
    """A group from tensors; its images are blank, for the learner never looks at them."""
    images = np.zeros((len(tokens), 2, 2, 3), np.uint8)
    arrays = (tokens.int().numpy(), *(t.numpy() for t in (logprobs, logprobs, entropy, entropy)), images)
    return RolloutGroup(group_id, Prompt(group_id, text), tuple(range(len(tokens))), *arrays, version, "test", 0.0)


def low_tokens(group: RolloutGroup) -> np.ndarray:
    """A synthetic reward: the share of an image's tokens in the lower half of the codebook of 48."""
    return (group.tokens < 24).mean(axis=1)


def score(
    groups: Sequence[RolloutGroup], reward: Callable[[RolloutGroup], np.ndarray] = low_tokens
) -> list[ScoredGroup]:
    """Scores of one scorer named geneval, all valid."""
    scored = []
    for group in groups:
        scores = np.asarray(reward(group), np.float32).reshape(-1, 1)
        details = tuple({} for _ in scores)
        scored.append(ScoredGroup(group.group_id, ("geneval",), scores, np.ones(scores.shape, bool), details, 0.0))
    return scored


def train(learner: Learner, updates: int, group_size: int = 4) -> list[dict[str, float]]:
    """Synchronous updates on freshly sampled groups, seeded by the version."""
    history = []
    for _ in range(updates):
        groups = sample_groups(learner.policy, PROMPTS, group_size, version=learner.version, seed=learner.version)
        history.append(learner.update(groups, score(groups)))
    return history
