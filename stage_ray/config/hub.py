"""Repositories of a Hugging Face hub: how a config names them, their commits, and what is downloaded of them.

One notation for models, scorers and prompts, huggingface_hub's own: ``hf://[datasets/]OWNER/NAME[@REVISION][/PATH]``;
for a model also ``OWNER/NAME[@REVISION]``. A revision is a branch, a tag or a commit; without one it is the newest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stage_ray.errors import ConfigError

if TYPE_CHECKING:
    from huggingface_hub import HfUri

HUB = "hf://"
MODEL_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?")
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")  # what is downloaded of a model
PROCESSOR_FILES = ("*.json", "*.txt", "*.jinja")  # of a model whose weights are not wanted
PROMPT_FILES = ("*.txt",)  # of a directory of prompts; a file may be of any kind
COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_uri(location: str) -> HfUri | None:
    """What a location names in a hub; None for one that exists here or looks like a path (``/``, ``./``, ``~``).

    Raises:
        ConfigError: it begins with ``hf://`` and names neither a model nor a dataset.

    Example:
        >>> hub_uri("deepseek-community/Janus-Pro-1B@main").revision
        'main'
    """
    from huggingface_hub import HfUri, parse_hf_uri  # late, as below: not every command needs it
    from huggingface_hub.errors import HfUriError

    try:
        if location.startswith(HUB):
            found = parse_hf_uri(location)
            if found.type in ("model", "dataset"):
                return found
            raise ConfigError(f"{location} is a {found.type}; name a model, or hf://datasets/OWNER/NAME/FILE")
        match = MODEL_ID.fullmatch(location)
        if match is None or location.startswith((".", "~")) or Path(location).exists():
            return None
        return HfUri(type="model", id=match[1], revision=match[2])
    except HfUriError as error:
        raise ConfigError(f"{location}: {error}") from error


def is_pinned(uri: HfUri) -> bool:
    """Whether its revision is a whole commit."""
    return COMMIT.fullmatch(uri.revision or "") is not None


def at_commit(uri: HfUri, commit: str) -> str:
    """The location of the same at a commit."""
    pinned = replace(uri, revision=commit)
    return pinned.to_uri() if pinned.path_in_repo or pinned.type != "model" else f"{pinned.id}@{commit}"


def commit_of(uri: HfUri, key: str) -> str:
    """The commit that its revision means now; where the hub cannot be reached, what it meant when last asked here.

    Raises:
        ConfigError: there is no such repository or revision, access is refused, or nothing is known of it here.
    """
    from huggingface_hub import is_offline_mode, resolve_revision

    if uri.revision is not None and is_pinned(uri):
        return uri.revision
    try:
        return resolve_revision(
            uri.id, repo_type=uri.type, revision=uri.revision, local_files_only=is_offline_mode()
        ).resolved
    except _errors() as error:
        raise ConfigError(f"{key}: {_reason(uri, error)}") from error


def cached(uri: HfUri, patterns: Sequence[str]) -> Path | None:
    """What `download` gives, if all of it is in the cache of this machine; the hub is not asked."""
    with suppress(*_errors()):
        path = _snapshot(uri, patterns, local_files_only=True)
        return path if path.exists() else None
    return None


def download(uri: HfUri, patterns: Sequence[str], key: str) -> Path:
    """A directory of a repository (those files of it that match a pattern), or a file; from the cache where it can.

    Raises:
        ConfigError: as `commit_of`, or the repository has no such file.
    """
    try:
        path = _snapshot(uri, patterns)
    except _errors() as error:
        raise ConfigError(f"{key}: {_reason(uri, error)}") from error
    if not path.exists():
        raise ConfigError(f"{key}: {named(uri)}: the repository has no {uri.path_in_repo}")
    return path


def named(uri: HfUri) -> str:
    """The repository and the revision, for a message."""
    return f"{uri.id}@{uri.revision}" if uri.revision else uri.id


def _snapshot(uri: HfUri, patterns: Sequence[str], local_files_only: bool = False) -> Path:
    """Where a repository's file or directory is now, if it has it."""
    from huggingface_hub import snapshot_download

    inside = uri.path_in_repo
    allowed = [inside, *(f"{inside}/{pattern}" for pattern in patterns)] if inside else list(patterns)
    root = snapshot_download(
        uri.id,
        repo_type=uri.type,
        revision=uri.revision,
        allow_patterns=allowed,
        local_files_only=local_files_only,
    )
    return Path(root, inside)


def _errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where a repository cannot be had; OSError is a full disk too."""
    from httpx2 import HTTPError
    from huggingface_hub import errors

    return HTTPError, errors.EntryNotFoundError, errors.HFValidationError, errors.RevisionResolutionError, OSError


def _reason(uri: HfUri, error: Exception) -> str:
    """One sentence that says what is wrong with a repository and what helps."""
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_CACHE

    match error:
        case errors.GatedRepoError():
            return f"{uri.id} is gated: accept its terms at {uri.to_url()}, and set HF_TOKEN to a token of that account"
        case errors.RepositoryNotFoundError():
            return (
                f"{uri.id} is no directory here and was not found on the hub; check the name, or set HF_TOKEN to a "
                "token that may read it if it is private"
            )
        case errors.RevisionNotFoundError():
            return f"{uri.id} has no revision {uri.revision!r} on the hub; name a branch, a tag or a commit of it"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return (
                f"the hub refuses {named(uri)} ({error.response.status_code}); set HF_TOKEN to a token that may read it"
            )
        case errors.LocalEntryNotFoundError() | errors.RevisionResolutionError():
            return (
                f"{named(uri)} is no directory here, is not (or not whole) in the cache {HF_HUB_CACHE}, and the hub "
                "cannot be reached; run `stage-ray fetch CONFIG` where it can be, or name a directory"
            )
    return f"{named(uri)} cannot be downloaded: {' '.join(str(error).split()) or type(error).__name__}"
