"""``stage-ray index``: pictures that the token rule ``retrieval`` draws from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option, echo

from stage_ray.config.paths import require_lasting

MODEL = "The model that is to draw: its image tokenizer encodes the pictures"
KIND = "exact: all patches are compared; ivfpq: faiss' index, for more than a million; auto: by their number"
FAMILY = "As policy.family, for a model whose config.json does not say it"


def index(
    model: Annotated[str, Argument(metavar="MODEL", help=MODEL)],
    pictures: Annotated[Path, Argument(metavar="PICTURES", help="A directory: png, jpg, webp, at any depth")],
    out: Annotated[Path, Option(metavar="FILE", help="For rollout.sampler_options.index, such as patches.safetensors")],
    kind: Annotated[Literal["auto", "exact", "ivfpq"], Option(help=KIND)] = "auto",
    family: Annotated[str | None, Option(help=FAMILY)] = None,
) -> None:
    """Encode the pictures of a directory as tokens, for the token rule retrieval.

    Pictures that cannot be read are named and left out. If it is stopped, the same command goes on in FILE.parts.

    Example: stage-ray index runs/stage_shapeworld/final photos --out patches.safetensors
    """
    require_lasting(out, "--out")
    from stage_ray.inference.picture_index import index_pictures

    index_pictures(model, pictures, out, kind=kind, family=family)
    echo(f"--set rollout.sampler=retrieval --set rollout.sampler_options.index={out}")
