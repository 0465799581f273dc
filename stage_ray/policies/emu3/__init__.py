"""Emu3, of transformers' classes: prompts, rows that end in a fixed token, the image tokenizer, how vLLM serves it."""

from stage_ray.policies.emu3.policy import Emu3Policy

__all__ = ["Emu3Policy"]
