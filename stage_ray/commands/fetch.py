"""``stage-ray fetch``: what a config names in a hub, into this machine's cache."""

from __future__ import annotations

from dataclasses import replace

from typer import echo

from stage_ray.commands.train import ConfigArgument, SetOption
from stage_ray.errors import ConfigError, RunError


def fetch(
    config: ConfigArgument,
    overrides: SetOption = None,
) -> None:
    """Download the models, scorers and prompts that a config names in a hub, for machines without a network.

    They go to the cache of huggingface_hub (HF_HOME); what is there already is not downloaded again. HF_TOKEN opens
    gated and private ones. Afterwards HF_HUB_OFFLINE=1 stage-ray train CONFIG asks no hub.

    Example: stage-ray fetch stage_shapeworld --set policy.path=deepseek-community/Janus-Pro-1B
    """
    from stage_ray.config.hub import commit_of, download, named
    from stage_ray.config.inputs import files_of, hub_inputs
    from stage_ray.config.load import load_config
    from stage_ray.evaluation.suites import resolve_suites

    found = hub_inputs(resolve_suites(load_config(config, overrides)))
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
