"""Model families, one file each; `load_policy` picks by ``policy.family``."""

from __future__ import annotations

import torch

from stage_ray.config import PolicyConfig
from stage_ray.policies.base import Policy


def load_policy(config: PolicyConfig, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Policy:
    """Load the policy that a config names, every parameter outside the trained ones frozen.

    Raises:
        ConfigError: the checkpoint is missing, incomplete, or of another architecture.

    Example:
        policy = load_policy(run.policy, device=device_for(run.learner.gpus))
    """
    from stage_ray.policies.janus import JanusPolicy  # late: transformers takes seconds to import

    families = {"janus": JanusPolicy}
    return families[config.family].load(config, device=device, dtype=dtype)
