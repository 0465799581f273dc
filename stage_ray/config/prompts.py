"""Which prompts a run trains on, from one file or several, and which are held out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from stage_ray.config.base import Section

FORMS = ("(file)", "(files)")  # of prompts.train, as pydantic names them in the place of an error


class PromptFile(Section):
    """One of several prompt files that are mixed."""

    path: str = Field(description="As prompts.train, where that is one file")
    weight: float = Field(1.0, gt=0, description="Prompts that are drawn of it, relative to the other files")


class PromptsConfig(Section):
    """Which prompts are trained on, and which are held out."""

    train: Annotated[
        Annotated[str, Tag(FORMS[0])] | Annotated[list[PromptFile], Field(min_length=1), Tag(FORMS[1])],
        Discriminator(lambda value: FORMS[not isinstance(value, str)]),
    ] = Field(
        description="JSON Lines (GenEval's format) or text, a prompt a line; package:MODULE/FILE; or "
        "hf://datasets/OWNER/NAME[@REVISION]/FILE of a hub; geneval:train or geneval:test, which are made here; "
        "or several files: [{path: FILE, weight: 3}, ...]"
    )
    heldout: str | None = Field(None, description="Prompts of the evaluation before and after; same formats")
    shuffle: bool = Field(True, description="A new order every epoch, fixed by the run's seed")
    too_long: Literal["refuse", "drop"] = Field(
        "refuse", description="What becomes of prompts longer than rollout.max_prompt_tokens"
    )

    @property
    def files(self) -> dict[str, PromptFile]:
        """The files that are trained on, by the config's keys of their paths."""
        if isinstance(self.train, str):
            return {"prompts.train": PromptFile(path=self.train)}
        return {f"prompts.train.{index}.path": file for index, file in enumerate(self.train)}
