"""vLLM's entry point (``vllm.general_plugins``): makes the model known in every vLLM process."""

from __future__ import annotations

ARCHITECTURE = "StageRayJanusForImageGeneration"


def register() -> None:
    """Register the image-generation model by name; safe to call more than once."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "stage_ray.policies.janus.vllm_model:JanusForImageGeneration")
