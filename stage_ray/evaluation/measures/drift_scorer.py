"""`stage_ray.policies.drift` as a scorer, for two models on disk: what `stage-ray evaluate --against` measures with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.evaluation.measures.drift import IMAGES
from stage_ray.policies import load_policy
from stage_ray.policies.devices import device_for
from stage_ray.policies.drift import token_drift
from stage_ray.records import RolloutGroup
from stage_ray.rewards.base import RewardOutput
from stage_ray.samplers import SamplingParams


class DriftScorer:
    """Features: means over tokens of `token_drift`, float32 [B, 3 or 6]; the first `IMAGES` of a group stand for all.

    The score is the KL, which is for measures and no reward.
    """

    def __init__(self, policy: dict[str, Any], reference: dict[str, Any], rollout: dict[str, Any]) -> None:
        """Load both models, in float32; ``policy``, ``reference``, ``rollout``: sections of a config."""
        self._sampling = SamplingParams.of(sampling := RolloutConfig.model_validate(rollout))
        self._device = device_for(sampling.gpus, "rollout.gpus")
        self._policy, self._reference = (
            load_policy(PolicyConfig.model_validate(it), device=self._device, trainable=False)
            for it in (policy, reference)
        )

    def score_groups(self, groups: Sequence[RolloutGroup]) -> RewardOutput:
        """The drift of whole groups, whichever model drew them."""
        rows = []
        for group in groups:
            tokens = torch.as_tensor(group.tokens[:IMAGES], dtype=torch.int64, device=self._device)
            prompts = [self._policy.codec.encode_prompt(group.prompt.drawn_text)] * len(tokens)
            found = token_drift(self._policy, self._reference, prompts, tokens, self._sampling).mean(1).cpu().numpy()
            rows.append(found[np.arange(len(group.tokens)) % len(found)])
        features = np.concatenate(rows)
        return RewardOutput(features[:, 0], np.isfinite(features[:, 0]), tuple({} for _ in features), features)
