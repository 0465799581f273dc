"""Algorithms, one file each; a config's ``recipe`` names the file, or the dotted path of a class from elsewhere."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from stage_ray.config import AlgorithmConfig, RunConfig
from stage_ray.errors import ConfigError, impossible, suggest
from stage_ray.recipes.base import Recipe
from stage_ray.registry import Registry

RECIPES = Registry("stage_ray.recipes", "Recipe", "recipe")


def load_recipe(run: RunConfig) -> Recipe:
    """The recipe that a config names, its options checked.

    Raises:
        ConfigError: no such recipe, an option that it does not have (with the nearest one, or the recipe that has it),
            or an impossible value.
    """
    kind = RECIPES.find(run.recipe, "recipe")
    if not (isinstance(kind, type) and issubclass(kind, Recipe)):
        raise ConfigError(f"recipe = {run.recipe!r} is no class that derives from stage_ray.recipes.base.Recipe")
    given = run.algorithm.model_extra or {}  # keys that are not shared by all recipes
    for name, value in given.items():
        if name not in kind.Options.model_fields:
            raise ConfigError(_unknown(run.recipe, kind, name, value))
    kind.check(run)
    learner = run.learner
    if learner.several_updates and run.algorithm.clip is None and not kind.bounded:
        several = "updates_per_batch" if learner.updates_per_batch > 1 else "groups_per_update"
        raise ConfigError(
            f"learner.{several} = {getattr(learner, several)} moves the policy several times on one batch, which needs "
            "a bound: set algorithm.clip=0.2, or recipe=pcpo"
        )
    try:
        return kind(kind.Options.model_validate(given), run.algorithm)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(impossible(".".join(["algorithm", *map(str, item["loc"])]), item) for item in error.errors())
        ) from error


def resolve_recipe(run: RunConfig) -> RunConfig:
    """The same run, with every option of its recipe under ``algorithm``, defaults included; errors of `load_recipe`."""
    options = load_recipe(run).options.model_dump()
    return run.model_copy(update={"algorithm": run.algorithm.model_copy(update=options)})  # both are frozen


def _unknown(recipe: str, kind: type[Recipe], name: str, value: Any) -> str:
    """What is wrong with an option that the recipe does not have, and what to do."""
    known = [*kind.Options.model_fields, *AlgorithmConfig.model_fields]  # its own and the shared ones
    # Those that define it themselves; the ones that are built on them have it too.
    others = [other for other in RECIPES.names() if name in RECIPES.find(other, "recipe").Options.__annotations__]
    if others:
        fix = f"it belongs to recipe {' and '.join(others)}; remove it, or set recipe={others[-1]}"
    else:
        fix = suggest(name, known, "algorithm.")
    return f"algorithm.{name} = {value!r} is no option of recipe {recipe}: {fix}"
