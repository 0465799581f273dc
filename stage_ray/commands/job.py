"""What a submitted job is, decided on this machine: its name, command, environment and the files that it carries.

Ray's own client packs the files and leaves out what .gitignore and .rayignore name; `stage_files` only puts them into
one directory. Ray unpacks it as the job's working directory on every node and puts it first on Python's path.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stage_ray
from stage_ray.config import RunConfig
from stage_ray.config.hub import HUB
from stage_ray.config.inputs import inputs, takes_prompts
from stage_ray.config.load import config_files, load_config, read_mapping
from stage_ray.config.paths import PACKAGE
from stage_ray.config.shipped import DIRECTORY, config_path
from stage_ray.errors import ConfigError

CAP_MIB = 100  # Ray's dashboard takes no larger upload (its ``DASHBOARD_CLIENT_MAX_SIZE``)
ENVIRONMENT = ("conda", "config", "env_vars", "pip", "py_modules", "uv")  # the other keys of Ray say where the code is


@dataclass(frozen=True, slots=True)
class Job:
    """What a cluster is asked to run.

    Attributes:
        name: submission id of the first attempt; later ones are ``name.2``, ``name.3`` ...
        run_dir: where the run writes, as the cluster's machines see it.
        entrypoint: shell command of the driver.
        files: what the job carries, name in its working directory to file or directory here.
        digest: of the run directory and the whole config; a name stands for one of them. Not of the code, so that a
            fixed scorer goes on with the run that it broke.
        runtime_env: Ray's, all but the working directory. ``env_vars`` are those of the driver and all workers; they
            may be secret, so it is never printed.
    """

    name: str
    run_dir: str
    entrypoint: str
    files: dict[str, Path] = field(repr=False)
    digest: str = ""
    runtime_env: dict[str, Any] = field(default_factory=dict, repr=False)

    def attempt(self, submission_id: str | None) -> int | None:
        """Which attempt at this job a submission id means: ``first`` 1, ``first.3`` 3; None if it is of another job."""
        found = re.fullmatch(re.escape(self.name) + r"(?:\.(\d+))?", submission_id or "")
        return int(found[1] or 1) if found else None


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
    runtime_env: Path | None = None,
) -> Job:
    """Check everything that can be checked here, and make the job of it; each argument is an option of the command.

    Raises:
        ConfigError: a wrong config, a run directory that would be lost, a variable that is not set, a wrong option.
    """
    config = config_path(config)
    run = load_config(config, overrides, run_dir)
    if "." not in run.recipe:  # a recipe or sampler of the user's own may be importable on the cluster only
        from stage_ray.recipes import load_recipe

        load_recipe(run)
    if "." not in run.rollout.sampler:
        from stage_ray.samplers import load_rule

        load_rule(run.rollout)
    relative = not Path(run.run_dir).is_absolute()
    if relative and not scratch:
        fix = "name shared storage, such as --run-dir /shared/runs/first, or add --scratch"
        why = "on the cluster it would lie in the job's temporary directory and be lost with it"
        raise ConfigError(f"run_dir = {run.run_dir!r} is relative: {why}; {fix}")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
        raise ConfigError(f"--id {name!r}: use up to 100 letters, digits, '-' and '_'")
    if working_dir is not None and image_has_code:
        raise ConfigError("--working-dir and --image-has-code exclude each other: the code comes from one place")
    inside, files = _files(config, run, code=not image_has_code, working_dir=working_dir)
    command = ["python", "-m", "stage_ray", "train", inside]
    command += [part for override in overrides for part in ("--set", override)]
    command += ["--run-dir", str(run_dir)] * (run_dir is not None and not relative) + ["--auto-resume"] * auto_resume
    here = f' --run-dir "$PWD"/{shlex.quote(run.run_dir)}' if relative else ""  # else the job would refuse it
    end = re.sub(r"[^A-Za-z0-9]+", "-", Path(run.run_dir).name).strip("-")[:40]
    digest = hashlib.sha256(json.dumps(run.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
    return Job(
        name=name or f"stage-ray-{end or 'run'}-{digest[:8]}",  # the same on every machine
        run_dir=run.run_dir,
        entrypoint=shlex.join(command) + here,
        files=files,
        digest=digest,
        # Of a user's directory no hidden file is sent, such as .env, whatever the ignore files say.
        runtime_env=_runtime_env(runtime_env, env) | {"excludes": [".[!.]*"] if working_dir else []},
    )


def stage_files(job: Job, directory: Path) -> Path:
    """Make an empty directory into the job's: links to its files, which Ray's client follows, and a file of its own.

    By that no two packages are the same. Ray names one by its content and deletes it when its last job ends; a next
    attempt at that moment with the same content would be told that the cluster has it, and then find it gone.
    """
    for name, path in job.files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).symlink_to(path.resolve())
    (directory / "submission").write_text(uuid.uuid4().hex, encoding="utf-8")
    return directory


def _files(config: Path, run: RunConfig, *, code: bool, working_dir: Path | None) -> tuple[str, dict[str, Path]]:
    """Name of the config in the job's directory, and all that lies there: code and named files, or a directory."""
    root = (working_dir or Path.cwd()).resolve()
    if not root.is_dir():
        raise ConfigError(f"--working-dir {working_dir} is not a directory")
    files = _named_files(run, root, f"--working-dir {working_dir}" if working_dir else "the current directory")
    inside = config.resolve().is_relative_to(root)
    name = config.resolve().relative_to(root).as_posix() if inside else config.name
    own = {name: config}
    for base in config_files(config)[1:]:
        if base.parent == DIRECTORY != config.parent:  # named as package:..., which the job finds in the code
            continue
        beside = os.path.normpath(Path(name).parent / os.path.relpath(base, config.parent))
        if beside.startswith(".."):
            raise ConfigError(f"base = {base} of {config} leads out of what is sent; move it beside the config")
        own[beside] = base
    if working_dir is None:
        if code:  # the package that runs here, and its metadata: vLLM finds our plug-in as if it was installed
            distribution = importlib.metadata.distribution("stage-ray")
            metadata = Path(str(distribution.locate_file(f"stage_ray-{distribution.version}.dist-info")))
            known = [metadata / "METADATA", metadata / "entry_points.txt"]
            files["stage_ray"] = Path(stage_ray.__file__).parent
            files |= {f"{metadata.name}/{path.name}": path for path in known if path.is_file()}
        return name, files | own
    files = {path.name: path for path in working_dir.iterdir()}
    for beside, file in {} if inside else own.items():
        if files.setdefault(beside, file) != file:
            raise ConfigError(f"--working-dir {working_dir} holds another {beside}; move {file} into it, or rename it")
    return name, files


def _named_files(run: RunConfig, root: Path, called: str) -> dict[str, Path]:
    """Files and directories below ``root`` that relative paths of a config mean; hub ids and plain texts are skipped.

    Raises a `ConfigError` where the job would not find one: it leads out of what is sent, is missing, or is too large.
    """
    fix = "move it there, or put it on storage that the cluster shares and give its absolute path"
    found = {}
    for key, name in inputs(run).items():
        if name.startswith((PACKAGE, HUB, "/", "~")):
            continue
        inside = os.path.normpath(name)  # not resolved: the job looks it up by its name, so a link stays a link
        path = root / inside
        if inside.startswith("..") and (path.exists() or takes_prompts(key)):
            raise ConfigError(f"{key} = {name!r} leads out of {called}, and a job finds only what lies below; {fix}")
        if takes_prompts(key) and not path.exists():
            raise ConfigError(f"{key} = {name!r} is no file in {called}; {fix}")
        if path.exists():
            size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()) / 2**20
            if size > CAP_MIB:
                raise ConfigError(f"{key} = {name!r} has {size:.0f} MiB and Ray takes {CAP_MIB} at most; {fix}")
            found[inside] = path
    return found


def _runtime_env(path: Path | None, names: Sequence[str]) -> dict[str, Any]:
    """Ray's runtime environment of a file, which Ray itself checks, with variables of this process by their names."""
    for name in names:
        if "=" in name:  # the rest may be a secret, and is not repeated
            raise ConfigError(
                f"--env {name.partition('=')[0]}=...: give the name alone; the value comes from your environment, "
                "so that no list of processes shows it"
            )
        if name not in os.environ:
            raise ConfigError(f"--env {name}: no such variable is set here")
    values = _read_runtime_env(path) if path is not None else {}
    theirs = values.get("env_vars", {})
    if twice := sorted(theirs.keys() & set(names)):
        raise ConfigError(f"{twice[0]} is given by --env and by env_vars of {path}; leave one of them out")
    stop_wait = {"RAY_JOB_STOP_WAIT_TIME_S": "300"}  # time to end and save a step; Ray's own default is 3 s
    return values | {"env_vars": stop_wait | theirs | {name: os.environ[name] for name in names}}


def _read_runtime_env(path: Path) -> dict[str, Any]:
    known = f"known in it: {', '.join(ENVIRONMENT)}"
    values = read_mapping(path, f"--runtime-env {path}", f"; {known}")
    for key in sorted(values.keys() - set(ENVIRONMENT), key=str):
        ours = f"{key} is set by this command; use --working-dir DIR, and a .rayignore in it"
        why = ours if key in ("working_dir", "excludes") else f"unknown key {key!r}; {known}"
        raise ConfigError(f"--runtime-env {path}: {why}")
    variables = values.get("env_vars", {})
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        raise ConfigError(f'--runtime-env {path}: env_vars is no mapping of names to texts, such as {{DEBUG: "1"}}')
    from ray.runtime_env import RuntimeEnv

    try:
        RuntimeEnv(**values)
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"--runtime-env {path}: {' '.join(str(error).split())}") from error
    return values
