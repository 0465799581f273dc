"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

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
