"""Configs and studies that ship with the package: found by name wherever it is installed, listed, copied to edit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from stage_ray.config.paths import PACKAGE
from stage_ray.errors import ConfigError, suggest

DIRECTORY = Path(__file__).parents[1] / "configs"  # in a checkout a link to configs/ at the top, in a wheel its copy
STUDY = "study_"  # the names of studies begin with it


def shipped_configs() -> dict[str, Path]:
    """Of runs: name -> file, in alphabetical order."""
    return {name: path for name, path in _shipped().items() if not name.startswith(STUDY)}


def shipped_studies() -> dict[str, Path]:
    """Of studies: name -> file, in alphabetical order."""
    return {name: path for name, path in _shipped().items() if name.startswith(STUDY)}


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(DIRECTORY.glob("*.yaml"))}


def config_path(config: str | Path) -> Path:
    """The file that a command's CONFIG means: a file here, else the shipped config of that name, .yaml or not.

    Raises:
        ConfigError: there is neither; names the nearest shipped one.
    """
    return _path_of(config, "config", shipped_configs())


def study_path(study: str | Path) -> Path:
    """The file that STUDY means, likewise, with errors of `config_path`."""
    return _path_of(study, "study", shipped_studies())


def _path_of(name: str | Path, what: str, known: Mapping[str, Path]) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if (shipped := known.get(str(path).removesuffix(".yaml"))) is not None:
        return shipped
    fix = suggest(path.stem, known.keys())
    near = fix.startswith("did you mean")  # a file's name that is like none of ours was not meant to be one
    raise ConfigError(f"{what} file {path} does not exist" + f"; {fix}" * (near or not path.suffix))


def opening(path: Path) -> list[str]:
    """The comment lines with which a config begins, without their #: what it is for, what it needs, how it ends."""
    comments = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8"))
    return [line.lstrip("# ") for line in comments[0].splitlines()] if comments else []


def copy_to_edit(name: str) -> str:
    """The text of a shipped config that means the same wherever it lies: its base is ours.

    Raises:
        ConfigError: no config of that name ships; names the nearest.
    """
    known = shipped_configs()
    name = name.removesuffix(".yaml")
    if name not in known:
        raise ConfigError(f"no config {name!r} ships with stage_ray; {suggest(name, known)}")
    base = f"base: {PACKAGE}{__name__.partition('.')[0]}/configs/"
    return re.sub("^base: ", base, known[name].read_text(encoding="utf-8"), flags=re.MULTILINE)
