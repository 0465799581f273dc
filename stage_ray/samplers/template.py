"""A fixed frame around every prompt, such as the words that a model was trained to answer with good pictures."""

from __future__ import annotations

from pydantic import Field

from stage_ray.records import Prompt
from stage_ray.samplers.base import PromptTransform


class TemplateTransform(PromptTransform):
    """``template`` with the prompt's text in the place of ``{prompt}``."""

    template: str = Field(
        "a photo of {prompt}, high quality", pattern=r"\{prompt\}", description="What is drawn; {prompt} is the text"
    )

    def rewrite(self, prompt: Prompt, seed: int) -> str:
        """See `PromptTransform.rewrite`."""
        return self.template.replace("{prompt}", prompt.text)
