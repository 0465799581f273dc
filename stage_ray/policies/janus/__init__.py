"""Janus and Janus-Pro: prompts, model, image tokenizer, how vLLM serves them, DeepSeek's layout of the weights."""

from stage_ray.policies.janus.deepseek import DeepSeekLayout
from stage_ray.policies.janus.policy import JanusPolicy

__all__ = ["DeepSeekLayout", "JanusPolicy"]
