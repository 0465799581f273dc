"""Prompt text to Janus' token ids, as transformers' processor and ``generate`` make them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from stage_ray.errors import ConfigError
from stage_ray.policies.base import PromptIds

if TYPE_CHECKING:
    from transformers import JanusProcessor

PAPER_ROLES = {"<|User|>": "User", "<|Assistant|>": "Assistant"}


class JanusPrompts:
    """The chat template of a processor, with the official roles or the paper's."""

    def __init__(self, processor: JanusProcessor, template: Literal["official", "paper"]) -> None:
        """Raises a `ConfigError` where the processor has no chat template."""
        chat_template: Any = processor.chat_template
        if not isinstance(chat_template, str):
            where = processor.tokenizer.name_or_path
            raise ConfigError(f"policy.path: {where} has no chat template (chat_template.jinja)")
        if template == "paper":
            for official, paper in PAPER_ROLES.items():
                chat_template = chat_template.replace(official, paper)
        self._processor, self._chat_template = processor, chat_template
        tokenizer = processor.tokenizer
        self._kept = {tokenizer.bos_token_id, int(tokenizer.convert_tokens_to_ids(tokenizer.boi_token))}
        self._pad = int(tokenizer.pad_token_id)
        self.encode = lru_cache(maxsize=4096)(self._encode)  # one prompt is asked for many times

    def _encode(self, text: str) -> PromptIds:
        """Both branches of a prompt: the chat with the image to begin, and the same with all but bos and boi blanked.

        The unconditional branch replaces every other token by pad and attends to it, as ``generate`` of transformers
        does (and the paper's code, arXiv 2509.25027).
        """
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        template = self._chat_template
        chat = self._processor.apply_chat_template(messages, add_generation_prompt=True, chat_template=template)
        encoded = self._processor(text=[chat], generation_mode="image")
        conditional = tuple(int(token) for token in encoded["input_ids"][0])
        unconditional = tuple(token if token in self._kept else self._pad for token in conditional)
        return PromptIds(conditional, unconditional)
