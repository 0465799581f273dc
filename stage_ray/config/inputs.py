"""What a run reads besides its config: prompts, models and the files of scorers, by the config's keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from stage_ray.config.hub import HUB, MODEL_FILES, PROCESSOR_FILES, PROMPT_FILES, at_commit, commit_of, hub_uri
from stage_ray.config.load import validate_config
from stage_ray.config.paths import resolve_path
from stage_ray.config.schema import RunConfig
from stage_ray.errors import ConfigError

if TYPE_CHECKING:
    from huggingface_hub import HfUri

SECTIONS: dict[str, Any] = {
    "prompts": {"train", "heldout"},
    "policy": {"path", "reference"},
    "rollout": {"sampler_options"},
    "rewards": {"__all__": {"options"}},
    "evaluation": {
        "suites": {"__all__": {"prompts": True, "rewards": {"__all__": {"options"}}}},
        "measures": {"__all__": {"options"}},
    },
}


PROCESSOR = "processor"  # a key that takes a model of which no weights are read
MODEL_KEYS = ("path", "reference", "clip", PROCESSOR)


def inputs(run: RunConfig) -> dict[str, str]:
    """Every text of a config that may lead to a file, a directory or a repository."""
    found = leaves(run.model_dump(mode="json", include=SECTIONS))
    return {key: value for key, value in found.items() if isinstance(value, str) and value}


def hub_inputs(run: RunConfig) -> dict[str, HfUri]:
    """Those of them that are repositories of a hub and not directories here."""
    texts = {key: text for key, text in inputs(run).items() if takes_model(key) or text.startswith(HUB)}
    return {key: uri for key, text in texts.items() if (uri := hub_uri(text)) is not None}


def checkpoint_inputs(run: RunConfig) -> dict[str, HfUri]:
    """Repositories that a checkpoint here names in its own config: its prompts' text encoder, an adapter's base."""
    found = {}
    for key, location in (("policy.path", run.policy.path), ("policy.reference", run.policy.reference)):
        if location is None or hub_uri(location) is not None:
            continue
        adapter = _said(location, "adapter_config.json")
        base, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
        encoder = _said(str(base or location), "config.json").get("text_encoder")
        named = {"base_model_name_or_path": f"{base}@{revision}" if revision else base, "text_encoder": encoder}
        for field, said in named.items():
            if isinstance(said, str) and (uri := hub_uri(said)) is not None:
                found[f"{key}: {field}"] = uri
    return found


def _said(location: str, file: str) -> dict[str, Any]:
    """A JSON object of a directory; empty where there is none to read, which is said where it is loaded."""
    with suppress(ConfigError, OSError, ValueError):
        said = json.loads((resolve_path(location) / file).read_text(encoding="utf-8"))
        return said if isinstance(said, dict) else {}
    return {}


def pin(run: RunConfig, known: Mapping[str, str]) -> tuple[RunConfig, dict[str, str]]:
    """The config with a commit in the place of each revision, so that every worker loads the same; and those commits.

    ``known`` are the commits of the run that goes on, by the location that was asked for. A scorer of the user's own
    gets a plain ``OWNER/NAME`` as it is: only one that was given a revision is sure to understand it.

    Raises:
        ConfigError: as `commit_of`.
    """
    commits, pinned, config = dict[str, str](), [], leaves(run.model_dump(mode="json"))
    for key, uri in hub_inputs(run).items():
        location, (scorer, option, _) = config[key], key.partition(".options.")
        kind = config.get(f"{scorer}.type") or config.get(f"{scorer}.scorer")  # of a reward, or of a measure
        if option and "." in str(kind) and "@" not in location:
            continue
        commits[location] = known.get(location) or commits.get(location) or commit_of(uri, key)
        pinned.append(f"{key}={json.dumps(at_commit(uri, commits[location]))}")
    return (validate_config(run.model_dump(mode="json"), pinned), commits) if pinned else (run, commits)


def takes_model(key: str) -> bool:
    """Whether a key's value is a directory with a model, or a repository."""
    return not key.startswith("prompts.") and key.rpartition(".")[2] in MODEL_KEYS


def takes_prompts(key: str) -> bool:
    """Whether a key's value is a place of prompts.

    Example:
        >>> takes_prompts("prompts.train"), takes_prompts("evaluation.suites.0.prompts"), takes_prompts("policy.path")
        (True, True, False)
    """
    return re.fullmatch(r"prompts\.\w+(\.\d+\.path)?|evaluation\.suites\.\d+\.prompts", key) is not None


def files_of(key: str) -> tuple[str, ...]:
    """Patterns of the files that are downloaded for a key."""
    if key.rpartition(".")[2] == PROCESSOR:
        return PROCESSOR_FILES
    return PROMPT_FILES if takes_prompts(key) else MODEL_FILES


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Every value of a config by its dotted key."""
    if isinstance(value, list | dict) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, item in items for k, v in leaves(item, f"{key}.{name}" if key else str(name)).items()}
    return {key: value}
