"""Janus and Janus-Pro: prompts, model, image tokenizer, and how vLLM serves them."""

from stage_ray.policies.janus.policy import JanusPolicy

__all__ = ["JanusPolicy"]
