"""LlamaGen, class- and text-conditional: modules, prompts, how vLLM serves them, the published layout."""

from stage_ray.policies.llamagen.policy import LlamaGenPolicy
from stage_ray.policies.llamagen.published import PublishedLayout

__all__ = ["LlamaGenPolicy", "PublishedLayout"]
