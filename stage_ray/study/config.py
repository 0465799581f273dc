"""A study's file: arms that differ in a few keys, the seeds, and the search that every arm goes through."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from stage_ray.config.load import config_files, explain, read_mapping
from stage_ray.config.sections import Section
from stage_ray.config.shipped import study_path
from stage_ray.errors import ConfigError, suggest

Overrides = list[str]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
SET = "KEY=VALUE, as of stage-ray train; "


class ArmConfig(Section):
    """What one arm trains."""

    config: str | None = Field(None, description="A file or the name of one that ships; null: the study's")
    set: Overrides = Field([], description=SET + "on top of the study's own")


class SearchConfig(Section):
    """How every arm finds the value of one key: with the same values, steps and seeds, which are not those reported."""

    key: str = Field("learner.lr", description="The key whose value is searched")
    values: list[float] = Field(min_length=2, description="Its values; the best mean headline after training is taken")
    seeds: Seeds = Field(description="Of the runs of each value")
    set: Overrides = Field([], description=SET + "of these runs, such as fewer steps")


class StudyConfig(Section):
    """A file for ``stage-ray study``. Its keys replace those of its ``base``, another study; its ``set`` adds."""

    config: str = Field(description="Of arms that name none: a file or the name of one that ships")
    dir: str = Field(description="Where runs and page lie; studies with one dir share the runs of equal arms")
    seeds: Seeds = Field(description="Of the runs that are compared; arms are paired by them")
    arms: dict[str, ArmConfig] = Field(min_length=1, description="By name; the others are compared with the first")
    set: Overrides = Field([], description=SET + "of every run")
    search: SearchConfig | None = Field(None, description="Of a value that each arm needs its own of; null: none")
    cpus_per_run: int = Field(2, ge=1, description="Cores of one run; as many go on at once as there are such shares")
    gpus_per_run: float = Field(0.0, ge=0, description="GPUs of one run, of a cluster's")
    address: str | None = Field(
        None,
        description="Ray cluster whose nodes train runs: auto, HOST:PORT; null: RAY_ADDRESS, else this machine",
    )

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        if self.search and (both := {*self.search.seeds} & {*self.seeds}):
            raise ValueError(
                f"seed {min(both)} is in search.seeds and in seeds: what a value was chosen on cannot report it; "
                "take others for one of them"
            )
        places: dict[str, str] = {}
        for name in self.arms:
            if (other := places.setdefault(slug(name), name)) != name or not slug(name):
                raise ValueError(f"arms {other!r} and {name!r} would share a directory; name one otherwise")
        return self

    def part(self, arms: Sequence[str], seeds: Sequence[int]) -> tuple[StudyConfig, list[str]]:
        """Some of its arms and seeds, in its own order, and their names for a file; all of them where none is named.

        An arm is named as in the file or as its directory is.

        Raises:
            ConfigError: the study has no such arm or seed.
        """
        known = {slug(name) for name in self.arms}
        if unknown := [name for name in arms if slug(name) not in known]:
            raise ConfigError(f"--arm {unknown[0]!r} is no arm of this study; {suggest(unknown[0], self.arms)}")
        if foreign := [seed for seed in seeds if seed not in self.seeds]:
            raise ConfigError(f"--seed {foreign[0]} is none of this study, whose seeds are {self.seeds}")
        named = {slug(name) for name in arms}
        chosen = {name: arm for name, arm in self.arms.items() if slug(name) in named}
        those = [seed for seed in self.seeds if seed in seeds]
        part = self.model_copy(update={"arms": chosen or self.arms, "seeds": those or self.seeds})
        return part, [*map(slug, chosen), *(f"seed-{seed}" for seed in those)]


def read_study(study: str | Path) -> StudyConfig:
    """Read a study's file, or the one of that name that ships.

    Raises:
        ConfigError: missing or unreadable file, unknown key, impossible value, or a seed both searched on and reported.
    """
    path, data = study_path(study), dict[str, Any]()
    for file in reversed(config_files(path)):
        above = read_mapping(file, str(file), " of keys to values")
        if isinstance(above.get("set"), list) and isinstance(data.get("set"), list):
            above["set"] = data["set"] + above["set"]
        data |= above
    data.pop("base", None)
    try:
        return StudyConfig.model_validate(data)
    except ValidationError as error:
        said = "; ".join(explain(item, StudyConfig) for item in error.errors())
        raise ConfigError(f"{path}: {said}") from error


def slug(name: str) -> str:
    """An arm's name as that of its directory."""
    return re.sub(r"\W+", "-", name.lower()).strip("-")
