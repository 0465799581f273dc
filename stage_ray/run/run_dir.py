"""The run directory: which driver may write into it, and what a resumed run must share with the one before."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

from stage_ray.config import RunConfig
from stage_ray.config.inputs import leaves, takes_prompts
from stage_ray.config.load import read_mapping, validate_config
from stage_ray.config.paths import resolve_path
from stage_ray.errors import ConfigError
from stage_ray.files import atomic_write, deny_others_writing, read_json
from stage_ray.recipes import resolve_recipe
from stage_ray.run.digests import digest_inputs
from stage_ray.samplers import resolve_samplers

log = logging.getLogger(__name__)

LOCK, INPUTS = ".lock", "inputs.json"
SMALL = "small.txt"  # marks a small copy of a finished run (`small_copy.py`), which has no weights to go on with

# Keys that a resumed run may change: placement, speed and logging, never what is computed.
FREE_KEYS = {"run_dir", "cluster", "checkpoint", "evaluation", "scoring", "logs", "policy.lora.export"}
FREE_NAMES = {"workers", "max_workers", "ranks", "tensor_parallel", "cpus", "gpus", "gpu_memory_utilization"}
FREE_NAMES |= {
    "resources",
    "timeout_s",
    "groups_per_call",
    "runtime_env",
    "export_dtype",
    "reference_offload",
    "gradient_checkpointing",
}

EXTENDED = {"steps", "learner.lr", "learner.schedule", "learner.warmup_steps"}
"""Keys that ``--extend`` may change besides, to train a run further from its weights and optimizer."""

Resume = bool | Literal["auto", "extend"]
"""Go on with the run that a directory holds: it must hold one (True), must not (False), either (auto), or it must and
may be trained further than it was meant to (extend)."""

RETRY_WAIT_S = 150.0
"""How long a retried job waits for the driver before it, which may still be saving on another machine."""


def resolved(run: RunConfig) -> RunConfig:
    """The same run, with every option of its recipe and of its samplers, defaults included.

    Raises:
        ConfigError: of `resolve_recipe` and `resolve_samplers`.
    """
    return resolve_samplers(resolve_recipe(run))


@contextlib.contextmanager
def open_run_dir(
    run: RunConfig, resume: Resume, commits: Mapping[str, str] | None = None, note: Callable[[str], None] = log.info
) -> Iterator[Path]:
    """Lock the run directory and write ``config.yaml`` into it, new or that of the run which goes on.

    ``inputs.json`` beside it keeps what the run began with: ``commits`` (of `pin`) and digests of all that lies here.

    Raises:
        ConfigError: it holds a run already and ``resume`` is False, or none and it is True; it holds something else;
            the config of its run differs; or another driver writes into it.
    """
    run, path = resolved(run), Path(run.run_dir)  # its config.yaml names every option, defaults included
    _check_ours(path, resume)
    deny_others_writing()
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"run_dir {path} cannot be written: {error.strerror}; name another --run-dir") from error
    with contextlib.suppress(PermissionError):  # a mounted volume may belong to another user
        path.chmod(path.stat().st_mode & 0o7755)
    with run_dir_lock(path, wait_s=RETRY_WAIT_S if resume == "auto" else 0.0):
        config_file, digests = path / "config.yaml", digest_inputs(run, note)
        if config_file.exists() and not _untouched(path):  # the run there goes on
            _check_same(run, config_file, resume, digests)
        else:
            atomic_write(path / INPUTS, json.dumps({"commits": dict(commits or {}), "digests": digests}, indent=1))
        atomic_write(config_file, yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
        yield path


def known_commits(run_dir: Path) -> dict[str, str]:
    """The commits with which the run of a directory began, by the location that was asked for; none if there is no run.

    Raises:
        RunError: the file is damaged.
    """
    return _inputs(run_dir).get("commits", {})


def is_finished(run: RunConfig) -> bool:
    """Whether its directory holds this very run, trained, evaluated and exported, or a small copy of it.

    Raises:
        ConfigError: it holds a run whose config or prompts differ; names the first key.
    """
    path = Path(run.run_dir)
    if not (path / "config.yaml").exists() or _untouched(path):
        return False
    _check_same(resolved(run), path / "config.yaml", "auto", digest_inputs(run, log.info))
    return (path / "final" / "config.json").exists() or (path / SMALL).exists()


@contextlib.contextmanager
def run_dir_lock(run_dir: Path, wait_s: float) -> Iterator[None]:
    """Exclude other drivers, which would cut the ledger back and overwrite checkpoints, here or over shared storage.

    The system frees the lock when this process ends, also by a kill. Storage without locks is used with a warning.

    Raises:
        ConfigError: another driver still holds it after ``wait_s`` seconds; says which process of which machine.
    """
    path = run_dir / LOCK
    lock = FileLock(path, timeout=wait_s, poll_interval=0.5, fallback_to_soft=False)  # a soft lock outlives a kill
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"run_dir {run_dir} is in use by {path.read_text(encoding='utf-8') or 'another run'}; let that end first, "
            "or name another --run-dir"
        ) from None
    except OSError as error:
        log.warning("%s cannot be locked (%s): let no second run write into it", run_dir, error)
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        lock.release()


def _check_ours(path: Path, resume: Resume) -> None:
    """Raise a ConfigError, and touch nothing, unless the directory is new, empty, or a run's that may go on."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run_dir {path} is a file; name a directory")
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"run_dir {path} is a link to nothing ({path.readlink()}); name another --run-dir")
    if (path / SMALL).exists():
        raise ConfigError(f"run_dir {path} holds a small copy of a run, without weights; name another --run-dir")
    if (path / "config.yaml").exists():
        if not resume and not _untouched(path):
            raise ConfigError(
                f"run_dir {path} already holds a run; add --resume to go on with it, or name another --run-dir"
            )
        return
    if resume in (True, "extend"):
        raise ConfigError(
            f"--resume: run_dir {path} holds no run; leave --resume out to begin one, or use --auto-resume"
        )
    if path.exists() and any(not _nobodys(item.name) for item in path.iterdir()):
        raise ConfigError(f"run_dir {path} is not empty and holds no run; name another --run-dir")


def _nobodys(name: str) -> bool:
    """Whether a file is no sign of a run: of a file system, or what a driver that was refused leaves."""
    return name in (LOCK, INPUTS, "logs", "lost+found", ".snapshot") or name.startswith((".nfs", "config.yaml."))


def _inputs(run_dir: Path) -> dict[str, dict[str, str]]:
    return read_json(run_dir / INPUTS) or {}


def _check_same(run: RunConfig, config_file: Path, resume: Resume, digests: Mapping[str, str]) -> None:
    """Raise a ConfigError that names the first key whose value a run that goes on must not change, old and new.

    The old config is read through today's defaults, so that it may lack keys that were added since.
    """
    try:
        before = validate_config(read_mapping(config_file, str(config_file), ""), source=str(config_file))
        old, new = (leaves(resolved(one).model_dump(mode="json")) for one in (before, run))
    except ConfigError as error:
        raise ConfigError(f"--resume: {error}; it was written by another version, or by hand") from error
    began = _inputs(config_file.parent).get("digests", {})
    for key in sorted(began.keys() & digests.keys()):
        if began[key] != digests[key]:
            what = "prompts" if takes_prompts(key) else "files"
            raise ConfigError(
                f"--resume: {key} = {new[key]!r} holds other {what} than when the run began; bring those back, or "
                "name another --run-dir"
            )
        new[key] = old[key]  # wherever they lie now
    for key in sorted(old.keys() | new.keys()):
        section, *names = key.split(".")
        free = (
            not FREE_KEYS.isdisjoint((section, key))
            or next((name for name in names if not name.isdigit()), "") in FREE_NAMES
        )
        if free or (resume == "extend" and key in EXTENDED and _extends(key, old.get(key), new.get(key))):
            continue
        if old.get(key) != new.get(key) and not _same_place(old.get(key), new.get(key)):
            fix = "or --extend to train a run further" if key in EXTENDED else "or another --run-dir"
            raise ConfigError(
                f"--resume: {key} was {old.get(key)!r} in {config_file} and is {new.get(key)!r} now; use the same "
                f"value, {fix}"
            )


def _extends(key: str, old: Any, new: Any) -> bool:
    return key != "steps" or new >= old


def _same_place(old: Any, new: Any) -> bool:
    """Whether two texts are paths of one file or directory, spelled otherwise."""
    try:
        return isinstance(old, str) and isinstance(new, str) and resolve_path(old).samefile(resolve_path(new))
    except (ConfigError, OSError):
        return False


def _untouched(path: Path) -> bool:
    """Whether a run that began here ended before it had anything to lose: no step, no evaluation."""
    metrics = path / "metrics.jsonl"
    return not (metrics.exists() and metrics.stat().st_size) and not (path / "evaluation").exists()
