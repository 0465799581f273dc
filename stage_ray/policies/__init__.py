"""Model families, a folder each: ``policy.family`` names the folder, or the dotted path of a `Policy` of your own."""

from __future__ import annotations

from pathlib import Path

import torch

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies.base import Policy
from stage_ray.pretrained import read_object
from stage_ray.registry import Registry

POLICIES = Registry("stage_ray.policies", "Policy", "family")


def policy_class(config: PolicyConfig) -> type[Policy]:
    """The family that a config names. Nothing is loaded, and transformers' models are not imported.

    Raises:
        ConfigError: there is no such family, or it is no `Policy`.
    """
    found = POLICIES.find(config.family, "policy.family")
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ConfigError(f"policy.family = {config.family!r} is no subclass of {Policy.__module__}.Policy")
    return found


def family_of(directory: Path, key: str) -> str | None:
    """The name of this package's family whose checkpoint lies there, by its ``config.json``; None if it is another's.

    Raises:
        ConfigError: there is no ``config.json``, or none that is readable; names ``key``.
    """
    found = read_object(directory / "config.json", key).get("model_type")
    names = (name for name in POLICIES.names() if POLICIES.find(name, "policy.family").model_type == found)
    return next(names, None)


def load_policy(
    config: PolicyConfig, *, device: torch.device, dtype: torch.dtype = torch.float32, trainable: bool = True
) -> Policy:
    """Load the policy that a config names, every parameter outside the trained ones frozen; all where not trainable.

    Raises:
        ConfigError: the checkpoint is missing, incomplete, or of another architecture.
    """
    return policy_class(config).load(config, device=device, dtype=dtype, trainable=trainable)
