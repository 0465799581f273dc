"""``stage-ray configs``, ``init``, ``fetch``: the configs that ship, one to edit, what a config names in a hub."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, echo

from stage_ray.commands.train import ConfigArgument, SetOption
from stage_ray.config.shipped import copy_to_edit, opening, shipped_configs, shipped_studies
from stage_ray.errors import ConfigError, RunError
from stage_ray.files import atomic_write, name_disk_errors, require_writable


def configs() -> None:
    """List the configs that ship with stage_ray, then the studies: what each is for, and what it needs.

    Example: stage-ray configs
    """
    for name, path in {**shipped_configs(), **shipped_studies()}.items():
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


def fetch(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Download the models, scorers and prompts that a config names in a hub, for machines without a network.

    They go to the cache of huggingface_hub (HF_HOME); what is there already is not downloaded again. HF_TOKEN opens
    gated and private ones. Afterwards HF_HUB_OFFLINE=1 stage-ray train CONFIG asks no hub.

    Example: stage-ray fetch stage_shapeworld --set policy.path=deepseek-community/Janus-Pro-1B
    """
    from stage_ray.config.hub import commit_of, download, named
    from stage_ray.config.inputs import checkpoint_inputs, files_of, hub_inputs
    from stage_ray.config.load import load_config
    from stage_ray.evaluation.suites import resolve_suites

    run = resolve_suites(load_config(config, overrides))
    found = hub_inputs(run) | checkpoint_inputs(run)
    for key, uri in found.items():
        try:
            commit = commit_of(uri, key)
            path = download(replace(uri, revision=commit), files_of(key), key)
        except ConfigError as error:  # the config is right; the hub or the right to read it is what fails
            raise RunError(str(error)) from error
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files) / 1e6
        echo(f"{key} = {named(uri)}: commit {commit}, {size:.1f} MB in {path}")
    if not found:
        echo("nothing to fetch: everything that this config names lies here")
