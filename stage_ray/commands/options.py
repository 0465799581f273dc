"""Arguments and options of the command line that several commands share, or that would be long where they stand."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import typer


class PretrainStage(StrEnum):
    """The stages of ``pretrain``, named here because importing them takes seconds."""

    prompts = "prompts"
    tokenizer = "tokenizer"
    language_model = "language-model"
    detector = "detector"
    clip = "clip"
    cards = "cards"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face directory (such as RUN_DIR/final), package:MODULE/DIR, or a hub id"
    ),
]
OverridesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key by its dotted name; may be repeated"),
]
EngineOption = Annotated[Literal["vllm", "torch"] | None, typer.Option(help="What draws; vllm where it is installed")]
GuidanceOption = Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is off", min=1.0)]
SeedOption = Annotated[int, typer.Option(help="Fixes every image", min=0)]
