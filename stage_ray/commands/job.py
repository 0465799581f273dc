"""A training as a Ray job, planned on this machine: its name, its command, what it carries. Nothing is sent here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stage_ray.commands.job_package import package_contents
from stage_ray.config import RunConfig
from stage_ray.config.load import load_config
from stage_ray.errors import ConfigError

STOP_WAIT_S = 300
"""After `ray job stop` a step may end and be saved before the job is killed; Ray's own default is 3 s."""

ENVIRONMENT = ("conda", "config", "env_vars", "pip", "py_modules", "uv")
"""Keys of Ray's runtime environment that --runtime-env takes; the others say where the code is, which we do."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a cluster is asked to run; made on this machine alone, nothing sent yet.

    Attributes:
        name: submission id of the first attempt; later ones are ``name.2``, ``name.3`` ...
        run_dir: where the run writes, as the cluster's machines see it.
        entrypoint: shell command of the driver.
        files: of the package it carries, name inside to path here.
        variables: environment of the driver and all workers; may be secret, so it is never printed.
        cpus: reserved for the driver; anything but 0 lets it leave the head node.
        resources: custom resources reserved for the driver, such as ``{"driver": 1}``.
        digest: of the run directory and the whole config; a name stands for one of them. Not of the code, so that a
            mended scorer goes on with the run that it broke.
        environment: more of Ray's runtime environment, such as ``{"pip": ["nltk"]}``; may be secret.
    """

    name: str
    run_dir: str
    entrypoint: str
    files: dict[str, Path] = field(repr=False)
    variables: dict[str, str] = field(default_factory=dict, repr=False)
    cpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    digest: str = ""
    environment: dict[str, Any] = field(default_factory=dict, repr=False)


def plan_job(
    config: Path,
    overrides: Sequence[str] = (),
    run_dir: Path | None = None,
    *,
    auto_resume: bool = True,
    name: str | None = None,
    working_dir: Path | None = None,
    image_has_code: bool = False,
    scratch: bool = False,
    env: Sequence[str] = (),
    cpus: float = 0.0,
    resources: str | None = None,
    runtime_env: Path | None = None,
) -> Job:
    """Check everything that can be checked here.

    Raises:
        ConfigError: a wrong config, a run directory that would be lost, a variable that is not set, a wrong option.

    Example:
        plan_job(Path("configs/stage_shapeworld.yaml"), run_dir=Path("/shared/runs/first")).name
        # 'stage-ray-first-' and eight digits of a hash
    """
    run = load_config(config, list(overrides), run_dir)
    if not Path(run.run_dir).is_absolute() and not scratch:
        raise ConfigError(
            f"run_dir = {run.run_dir!r} is relative: on the cluster it would lie in the job's temporary directory and "
            "be lost with it; name shared storage, such as --run-dir /shared/runs/first, or add --scratch"
        )
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
        raise ConfigError(f"--id {name!r}: use up to 100 letters, digits, '-' and '_'")
    if working_dir is not None and image_has_code:
        raise ConfigError("--working-dir and --image-has-code exclude each other: the code comes from one place")
    inside, files = package_contents(config, run, code=not image_has_code, working_dir=working_dir)
    command = ["python", "-m", "stage_ray", "train", inside]
    command += [part for override in overrides for part in ("--set", override)]
    command += ["--run-dir", str(run_dir)] * (run_dir is not None) + ["--auto-resume"] * auto_resume
    variables, environment = _variables(env), _environment(runtime_env)
    ours = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    theirs = environment.pop("env_vars", {})
    if twice := sorted(variables.keys() & theirs.keys()):
        raise ConfigError(f"{twice[0]} is given by --env and by env_vars of {runtime_env}; leave one of them out")
    return Job(
        name=name or job_name(run),
        run_dir=run.run_dir,
        entrypoint=shlex.join(command),
        files=files,
        variables=ours | theirs | variables,
        cpus=cpus,
        resources=_resources(resources),
        digest=_digest(run),
        environment=environment,
    )


def job_name(run: RunConfig) -> str:
    """Name of a run's job: the end of its run directory, and a hash of the directory and the whole config.

    Example:
        a run in /shared/runs/first is ``stage-ray-first-6d0c1a52``, and stays it on every machine
    """
    end = re.sub(r"[^A-Za-z0-9]+", "-", Path(run.run_dir).name).strip("-")[:40]
    return f"stage-ray-{end or 'run'}-{_digest(run)[:8]}"


def _digest(run: RunConfig) -> str:
    return hashlib.sha256(json.dumps(run.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def attempt_of(job: Job, submission_id: str | None) -> int | None:
    """Which attempt at this job a submission id means, from 1; None if it belongs to another job.

    Example:
        >>> job = Job("first", "/shared/first", "", {})
        >>> [attempt_of(job, name) for name in ("first", "first.3", "firsts", None)]
        [1, 3, None, None]
    """
    found = re.fullmatch(re.escape(job.name) + r"(?:\.(\d+))?", submission_id or "")
    return int(found[1] or 1) if found else None


def _variables(names: Sequence[str]) -> dict[str, str]:
    for name in names:
        if "=" in name:  # the rest may be a secret, and is not repeated
            raise ConfigError(
                f"--env {name.partition('=')[0]}=...: give the name alone; the value comes from your environment, "
                "so that no list of processes shows it"
            )
        if name not in os.environ:
            raise ConfigError(f"--env {name}: no such variable is set here")
    return {name: os.environ[name] for name in names}


def _environment(path: Path | None) -> dict[str, Any]:
    """A file's part of Ray's runtime environment, checked by Ray itself."""
    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--runtime-env {path} is not readable YAML: {' '.join(str(error).split())}") from error
    known = ", ".join(ENVIRONMENT)
    if not isinstance(values, dict):
        raise ConfigError(f"--runtime-env {path} holds no mapping; known in it: {known}")
    for key in values:
        if key in ("working_dir", "excludes"):
            raise ConfigError(
                f"--runtime-env {path}: {key} is set by this command; use --working-dir DIR, and a .rayignore in it"
            )
        if key not in ENVIRONMENT:
            raise ConfigError(f"--runtime-env {path}: unknown key {key!r}; known in it: {known}")
    variables = values.get("env_vars", {})
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        raise ConfigError(f'--runtime-env {path}: env_vars is no mapping of names to texts, such as {{DEBUG: "1"}}')
    from ray.runtime_env import RuntimeEnv

    try:
        RuntimeEnv(**values)
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"--runtime-env {path}: {' '.join(str(error).split())}") from error
    return values


def _resources(text: str | None) -> dict[str, float]:
    try:
        value = yaml.safe_load(text or "{}")
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(amount, int | float) for amount in value.values()):
        raise ConfigError(
            f"--entrypoint-resources {text!r} is not a mapping of names to numbers, such as {{driver: 1}}"
        )
    return {str(name): float(amount) for name, amount in value.items()}
