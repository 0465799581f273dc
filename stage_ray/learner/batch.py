"""From records to one batch of tensors, refused as a whole if anything in it is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage_ray.config import RunConfig
from stage_ray.learner.schedule import learning_rate
from stage_ray.policies.base import Policy
from stage_ray.policies.codec import PromptIds
from stage_ray.recipes.base import GroupBatch
from stage_ray.records import RECORDED, RolloutGroup, ScoredGroup


class LearnerError(RuntimeError):
    """An update that must not happen: one sentence naming the cause. No weight has changed when it is raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(GroupBatch):
    """What a recipe sees of a batch, and what the learner needs beside it.

    Attributes:
        prompts: one a group.
        behavior_logprobs, guided_behavior_logprobs: float32 [N, G, T], what ratios are taken against, where that was
            fixed before the first of several updates.
    """

    prompts: tuple[PromptIds, ...]
    behavior_logprobs: Tensor | None = None
    guided_behavior_logprobs: Tensor | None = None

    def select(self, groups: Tensor) -> Batch:
        """The batch of some of its groups: ``groups`` int64 [n], in the order of the batch."""
        fixed = ("behavior_logprobs", "guided_behavior_logprobs")
        rows = ("tokens", *RECORDED, "scores", "staleness", "guided", *fixed)
        index = groups.to(self.tokens.device)
        found: dict[str, Any] = {name: value[index] for name in rows if (value := getattr(self, name)) is not None}
        for name in ("groups", "scored", "prompts"):
            found[name] = tuple(getattr(self, name)[n] for n in groups.tolist())
        return replace(self, **found, features={name: values[index] for name, values in self.features.items()})

    def micro_batches(self, images: int, groups: slice = slice(None)) -> list[Tensor]:
        """Indices n * G + g of each micro-batch: int64 [<= images]; prompts of like length together, to pad little.

        ``groups``: only of these.
        """
        group_size = self.tokens.shape[1]
        lengths = torch.tensor([len(prompt.conditional) for prompt in self.prompts[groups]])
        # Stable: images of one length keep their order. Indices count from the batch's first image.
        order = lengths.repeat_interleave(group_size).argsort(stable=True) + (groups.start or 0) * group_size
        return list(order.to(self.tokens.device).split(images))

    def prompts_of(self, indices: Tensor) -> list[PromptIds]:
        """The prompt of each image of a micro-batch."""
        group_size = self.tokens.shape[1]
        return [self.prompts[index // group_size] for index in indices.tolist()]  # n * G + g -> n

    def guided_of(self, indices: Tensor) -> Tensor | None:
        """Which images of a micro-batch were drawn with guidance, bool [B]; None where all of the batch were."""
        if all(group.guided for group in self.groups):
            return None
        return self.guided[indices.to(self.guided.device) // self.tokens.shape[1]]


def make_batch(
    groups: Sequence[RolloutGroup],
    scored: Sequence[ScoredGroup],
    *,
    run: RunConfig,
    version: int,
    policy: Policy,
    codebook: Tensor,
    device: torch.device,
) -> Batch:
    """Check and stack groups of one size, and their scores in the same order.

    Args:
        version: updates the learner has done.
        codebook: float32 [V, D], the policy's.

    Raises:
        LearnerError: nothing to train on, groups and scores that do not belong together, an invalid score, shapes or
            token ids that are not the policy's, values that are not finite, or a group beyond the staleness bound.
    """
    if not groups or len(groups) != len(scored):
        raise LearnerError(f"an update needs groups and as many scores, but got {len(groups)} and {len(scored)}")
    columns, shape = tuple(reward.column for reward in run.rewards), (policy.image_tokens, policy.codebook_size)
    for group, scores in zip(groups, scored, strict=True):
        _check_scores(group, scores, columns)
        _check_tokens(group, size=groups[0].tokens.shape[0], shape=shape)
        if not 0 <= version - group.policy_version <= run.pipeline.max_staleness:
            raise LearnerError(
                f"group {group.group_id} was sampled at version {group.policy_version}, the learner is at {version}; "
                f"pipeline.max_staleness allows a lag of 0 to {run.pipeline.max_staleness}"
            )

    def stack(arrays: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.stack(arrays), dtype=dtype, device=device)

    def stacked(name: str, dtype: torch.dtype) -> Tensor:
        return stack([getattr(group, name) for group in groups], dtype)

    unasked = {name for item in scored for name in item.unasked}
    return Batch(
        groups=tuple(groups),
        scored=tuple(scored),
        tokens=stacked("tokens", torch.int64),
        **{name: stacked(name, torch.float32) for name in RECORDED},
        # 0, like every constant, counts neither in a sum of scorers nor in their z-scores.
        scores=stack([np.where(item.asked, item.scores, 0) for item in scored], torch.float32),
        scorers=columns,
        scorer_weights=torch.tensor([reward.weight for reward in run.rewards], device=device),
        staleness=torch.tensor([version - group.policy_version for group in groups], device=device),
        guided=torch.tensor([group.guided for group in groups], device=device),
        features={name: _features(name, scored, device) for name in scored[0].features if name not in unasked},
        codebook=codebook,
        grid=policy.codec.grid,
        progress=version / run.steps,
        lr_factor=learning_rate(version, run.steps, run.learner) / run.learner.lr,
        prompts=tuple(policy.codec.encode_prompt(group.prompt.drawn_text) for group in groups),
    )


def _features(name: str, scored: Sequence[ScoredGroup], device: torch.device) -> Tensor:
    """A scorer's features of all images, float32 [N, G, D]; a LearnerError where a group lacks them."""
    found = [item.features.get(name, np.empty(0)) for item in scored]
    shapes = {array.shape for array in found}
    if len(shapes) > 1:
        raise LearnerError(f"scorer {name} gave features of different shapes in one batch: {sorted(map(str, shapes))}")
    return torch.as_tensor(np.stack(found), dtype=torch.float32, device=device)


def _check_scores(group: RolloutGroup, scores: ScoredGroup, columns: tuple[str, ...]) -> None:
    what = f"group {group.group_id}"
    if scores.group_id != group.group_id:
        raise LearnerError(f"{what} came with the scores of group {scores.group_id}")
    if tuple(scores.names) != columns:
        raise LearnerError(f"{what} was scored by {list(scores.names)}, but rewards[] names {list(columns)}")
    images = group.tokens.shape[0]
    if scores.scores.shape != (images, len(columns)) or scores.valid.shape != scores.scores.shape:
        raise LearnerError(f"{what} has {images} images, but scores of shape {list(scores.scores.shape)}")
    used = (scores.valid & np.isfinite(scores.scores))[:, scores.asked]
    if bad := int((~used).sum()):  # the driver replaces such groups before
        raise LearnerError(f"{what} has {bad} invalid scores; it must be scored again or replaced, not trained on")


def _check_tokens(group: RolloutGroup, *, size: int, shape: tuple[int, int]) -> None:
    what, (tokens, codes) = f"group {group.group_id}", shape
    if group.tokens.shape != (size, tokens) or size < 2:  # an advantage compares images of one group
        raise LearnerError(f"{what} has tokens of shape {list(group.tokens.shape)}, expected {[max(size, 2), tokens]}")
    if group.tokens.min() < 0 or group.tokens.max() >= codes:
        raise LearnerError(f"{what} has a token outside 0..{codes - 1}")
    for name in RECORDED:
        values = getattr(group, name)
        if values.shape != group.tokens.shape or not np.isfinite(values).all():
            raise LearnerError(f"{what}: its recorded {name} must be finite, of shape {list(group.tokens.shape)}")
