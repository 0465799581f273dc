"""Model families, a folder each: ``policy.family`` names the folder, or the dotted path of a `Policy` of your own."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies.adapter_files import read_adapter
from stage_ray.policies.base import Policy
from stage_ray.policies.lora import Adapters, check_targets, merge
from stage_ray.pretrained import base_location, located, read_object, tensor_shapes
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

    Where it is ``trainable``, ``policy.lora`` puts adapters in. An adapter that ``policy.path`` names goes on in these,
    and without them it is merged into the weights.

    Raises:
        ConfigError: the checkpoint is missing, incomplete, or of another architecture; or the adapter is of another
            model, or not as ``policy.lora`` has it.
    """
    saved = read_adapter(config.path)
    policy = policy_class(config).load(config, device=device, dtype=dtype, trainable=trainable)
    if config.lora is not None and trainable:
        policy.adapters = Adapters(policy, config.lora)
        if saved is not None:
            policy.adapters.load(saved)
    elif saved is not None:
        merge(policy, saved)
    return policy


def check_adapters(config: PolicyConfig) -> None:
    """Check ``policy.lora``, and an adapter that ``policy.path`` names, against the headers of their base.

    Nothing is checked of a base that would come from a hub.

    Raises:
        ConfigError: as `load_policy`.
    """
    saved, base = read_adapter(config.path), located(base_location(config.path))
    if base is None or (saved is None and config.lora is None):
        return
    shapes = tensor_shapes(base, (policy_class(config).trained_prefix,))
    if saved is not None:
        saved.check_fits(shapes)
    if config.lora is not None:
        # Matrices of layers, which are numbered.
        maps = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
        maps = [name for name in maps if re.search(r"\.\d+\.", name)]
        check_targets(config.lora, maps)
        if saved is not None:
            saved.check_same(config.lora, [m for m in maps if m.rpartition(".")[2] in config.lora.target_modules])
