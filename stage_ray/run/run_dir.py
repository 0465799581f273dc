"""The run directory: who may write into it, and what a resumed run must share with the one before."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Literal

import yaml

from stage_ray.config import RunConfig
from stage_ray.errors import ConfigError
from stage_ray.run.files import write_whole

# What may differ when a run goes on: where it runs and how often it looks, not what it computes.
FREE_KEYS = {"run_dir", "cluster", "checkpoint", "evaluation", "scoring", "logs"}
FREE_NAMES = {"workers", "max_workers", "ranks", "tensor_parallel", "cpus", "gpus", "resources", "timeout_s"}
FREE_NAMES |= {"gpu_memory_utilization"}


Resume = bool | Literal["auto"]
"""Go on with the run that a directory holds: it must (True), must not (False), or as it is (auto)."""


def open_run_dir(run: RunConfig, resume: Resume) -> Path:
    """Make the run directory and write ``config.yaml``, or check that an existing one may go on.

    Raises:
        ConfigError: it holds a run already and ``resume`` is False, or none and it is True; it holds something else; or
            the config of its run differs.
    """
    path = Path(run.run_dir)
    config_file = path / "config.yaml"
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run_dir {path} is a file; name a directory")
    if resume is True and not config_file.exists():
        raise ConfigError(
            f"--resume: run_dir {path} holds no run; leave --resume out to begin one, or use --auto-resume"
        )
    if config_file.exists() and not _untouched(path):
        if not resume:
            raise ConfigError(
                f"run_dir {path} already holds a run; add --resume to go on with it, or name another --run-dir"
            )
        _check_same(run, config_file)
    elif path.exists() and any(path.iterdir()) and not config_file.exists():
        raise ConfigError(f"run_dir {path} is not empty and holds no run; name another --run-dir")
    deny_others_writing()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(PermissionError):  # a mounted volume may belong to somebody else
        path.chmod(path.stat().st_mode & 0o7755)
    write_whole(config_file, yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
    return path


def deny_others_writing() -> None:
    """From now on nobody else may write what this process and its children create, whatever the umask was."""
    os.umask(os.umask(0o077) | 0o022)


def _untouched(path: Path) -> bool:
    """Whether a run that began here ended before it had anything to lose: no step, no evaluation."""
    metrics = path / "metrics.jsonl"
    return not (metrics.exists() and metrics.stat().st_size) and not (path / "evaluation").exists()


def _check_same(run: RunConfig, config_file: Path) -> None:
    before = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    now = run.model_dump(mode="json")
    for key in now.keys() - FREE_KEYS:
        old, new = _fixed(before.get(key)), _fixed(now[key])
        if old != new:
            raise ConfigError(
                f"--resume: {key} was {old!r} in {config_file} and is {new!r} now; "
                "use the same value, or another --run-dir"
            )


def _fixed(section: Any) -> Any:
    """A section of a config without what may differ."""
    if not isinstance(section, dict):
        return section
    return {name: value for name, value in section.items() if name not in FREE_NAMES}
