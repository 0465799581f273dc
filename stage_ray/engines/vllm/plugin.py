"""vLLM's entry point (``vllm.general_plugins``): makes every family's model known in every vLLM process."""

from __future__ import annotations

from stage_ray.policies import POLICIES
from stage_ray.policies.base import Policy


def architecture(family: type[Policy]) -> str:
    """The name by which vLLM finds a family's model class."""
    return "StageRay" + family.vllm_model.rpartition(":")[2]


def register() -> None:
    """Register the model of every family of this package; safe to call more than once."""
    for name in POLICIES.names():
        register_family(POLICIES.find(name, "policy.family"))


def register_family(family: type[Policy]) -> None:
    """Register one family's model by name, if it has one; vLLM imports it where it is needed."""
    from vllm import ModelRegistry

    if family.vllm_model and architecture(family) not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(architecture(family), family.vllm_model)
