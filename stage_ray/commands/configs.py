"""``stage-ray configs`` and ``stage-ray init``: the configs that ship with the package, and one of them to edit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, echo

from stage_ray.config.shipped import copy_to_edit, opening, shipped_configs
from stage_ray.errors import ConfigError
from stage_ray.files import atomic_write, name_disk_errors, require_writable


def configs() -> None:
    """List the configs that ship with stage_ray: what each is for, and what it needs.

    Example: stage-ray configs
    """
    for name, path in shipped_configs().items():
        echo("\n    ".join([name, *opening(path)]))


def init(
    name: Annotated[str, Argument(metavar="NAME", help="A config that ships; stage-ray configs lists them")],
    out: Annotated[Path | None, Option(metavar="FILE", help="Where to; NAME.yaml here by default")] = None,
) -> None:
    """Write a config that ships with stage_ray as a file of your own, to edit and train.

    Example: stage-ray init stage_shapeworld --out mine.yaml
    """
    text = copy_to_edit(name)
    file = out or Path(f"{name.removesuffix('.yaml')}.yaml")
    if os.path.lexists(file):
        raise ConfigError(f"{file} exists and is not overwritten; name another with --out FILE")
    require_writable(file.parent, "--out")
    with name_disk_errors(file, "give the same command again"):
        atomic_write(file, text)
    echo(f"{file} is yours to edit; then: stage-ray train {file}")
