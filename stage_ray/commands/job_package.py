"""What a submitted job carries: a zip of the config, the files it names, and the code; nothing else of this machine.

Ray unpacks it into the job's working directory on every node and puts that directory first on Python's path. Beside
the code lies a copy of its package metadata, so that vLLM finds our plug-in there as if the package were installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import stage_ray
from stage_ray.config import RunConfig
from stage_ray.config.paths import PACKAGE
from stage_ray.errors import ConfigError

CAP_MIB = 100
"""Ray's dashboard takes no larger upload (its ``DASHBOARD_CLIENT_MAX_SIZE``), whatever the head could keep."""
LEFT_OUT = {"__pycache__", "node_modules"}
LEFT_OUT_AT_TOP = {"runs", "tests", "build", "dist"}


def package_contents(
    config: Path, run: RunConfig, *, code: bool, working_dir: Path | None = None
) -> tuple[str, dict[str, Path]]:
    """Name of the config inside the package, and every file of the package: name inside to path here.

    Args:
        config: the YAML file.
        run: what it says, with overrides.
        code: also take the `stage_ray` that runs here.
        working_dir: take this directory instead of it and of the files that the config names; not what its
            .gitignore and .rayignore files name, as Ray.

    Raises:
        ConfigError: ``working_dir`` is no directory, or holds another file where the config must lie; or the config
            names a file by a relative path that would not be found on the cluster.
    """
    if working_dir is None:
        files = _own_code() if code else {}
        for key, name in _relative_paths(run):
            files |= _named_files(key, name, Path.cwd(), "the current directory")
    elif working_dir.is_dir():
        files = dict(_walk(working_dir, of_user=True))
        for key, name in _relative_paths(run):
            left_out = _named_files(key, name, working_dir, f"--working-dir {working_dir}").keys() - files.keys()
            if left_out:
                raise ConfigError(
                    f"{key} = {name!r}: {min(left_out)} is not sent with --working-dir {working_dir}: it is hidden, in "
                    "a directory of build output or runs, or a .gitignore or .rayignore names it; move it"
                )
    else:
        raise ConfigError(f"--working-dir {working_dir} is not a directory")
    name = _inside(config, working_dir or Path.cwd()) or config.name
    if name in files and not files[name].samefile(config):
        raise ConfigError(f"--working-dir {working_dir} holds another {name}; move {config} into it, or rename it")
    return name, files | {name: config}


def write_package(files: Mapping[str, Path], target: Path, cap_mib: float = CAP_MIB) -> Path:
    """Zip the files, for one submission: no two packages have the same bytes.

    Ray names a package by its bytes and deletes it when its last job ends. A next attempt that came at that moment with
    the same bytes would be told that the cluster has them already, and then find them gone.

    Raises:
        ConfigError: the zip is larger than ``cap_mib``.
    """
    with zipfile.ZipFile(target, "w") as package:
        package.comment = uuid.uuid4().bytes
        for name, path in sorted(files.items()):
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            with path.open("rb") as source, package.open(entry, "w", force_zip64=True) as sink:
                while block := source.read(2**20):
                    sink.write(block)
        sizes = Counter[str]()
        for info in package.infolist():
            sizes["/".join(info.filename.split("/")[:2])] += info.compress_size
    size = target.stat().st_size
    if size > cap_mib * 2**20:
        biggest = ", ".join(f"{name} ({bytes_ / 2**20:.1f} MiB)" for name, bytes_ in sizes.most_common(3))
        raise ConfigError(
            f"the job's package has {size / 2**20:.1f} MiB and Ray takes {cap_mib:g} at most; the biggest entries are "
            f"{biggest}: put them on storage that the cluster shares or into the image, or, with --working-dir, name "
            "them in a .rayignore"
        )
    return target


def _own_code() -> dict[str, Path]:
    """The package that runs here, in the shape of an unpacked wheel."""
    root = Path(stage_ray.__file__).parent
    files = {f"stage_ray/{name}": path for name, path in _walk(root)}
    distribution = importlib.metadata.distribution("stage-ray")
    directory = f"stage_ray-{distribution.version}.dist-info"
    for name in ("METADATA", "entry_points.txt"):
        path = Path(str(distribution.locate_file(f"{directory}/{name}")))
        if path.is_file():
            files[f"{directory}/{name}"] = path
    return files


def _relative_paths(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Key and value of what may be a relative path in a config: prompts, a model, any text among a scorer's options."""
    pending: list[tuple[str, Any]] = [
        ("prompts.train", run.prompts.train),
        ("prompts.heldout", run.prompts.heldout),
        ("policy.path", run.policy.path),
        *((f"rewards.{i}.options", reward.options) for i, reward in enumerate(run.rewards)),
    ]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [(f"{key}.{name}", below) for name, below in items]
        elif isinstance(value, str) and value and not value.startswith((PACKAGE, "/", "~")):
            yield key, value


def _named_files(key: str, name: str, root: Path, called: str) -> dict[str, Path]:
    """Files below ``root`` that a relative path of a config means; none if it is a hub id or plain text.

    Raises:
        ConfigError: the job would not find it, because it leads out of what is sent, or is not there.
    """
    inside = os.path.normpath(name)  # not resolved: the job looks it up by its name, so a link stays a link
    path = root / inside
    mend = "move it there, or put it on storage that the cluster shares and give its absolute path"
    if inside.startswith("..") and (path.exists() or key.startswith("prompts.")):
        raise ConfigError(f"{key} = {name!r} leads out of {called}, and a job finds only what lies below; {mend}")
    if key.startswith("prompts.") and not path.is_file():
        raise ConfigError(f"{key} = {name!r} is no file in {called}; {mend}")
    if path.is_dir():
        return {(Path(inside) / below).as_posix(): file for below, file in _walk(path)}
    return {inside: path} if path.is_file() else {}


def _inside(path: Path, directory: Path) -> str | None:
    """A path relative to a directory that it lies in; None if it lies elsewhere."""
    path, directory = path.resolve(), directory.resolve()
    return path.relative_to(directory).as_posix() if path.is_relative_to(directory) else None


def _walk(root: Path, *, of_user: bool = False) -> Iterator[tuple[str, Path]]:
    """Files below a directory with their names relative to it.

    Left out: what is hidden (``.git``, ``.venv``, ``.env``), caches, virtual environments, and links to directories;
    of a user's directory also runs, tests, build output, and what .gitignore and .rayignore files name.
    """
    pending: list[tuple[Path, list[Callable[[Path], bool]]]] = [(root, [])]
    while pending:
        directory, ignored = pending.pop()
        if of_user:
            ignored = ignored + _ignored(directory)
        for path in sorted(directory.iterdir()):
            hidden = path.name.startswith(".") or path.name in LEFT_OUT or path.name.endswith(".egg-info")
            at_top = of_user and directory == root and path.name in LEFT_OUT_AT_TOP
            if hidden or at_top or any(names(path) for names in ignored):
                continue
            if path.is_file():
                yield path.relative_to(root).as_posix(), path
            elif path.is_dir() and not path.is_symlink() and not (path / "pyvenv.cfg").exists():
                pending.append((path, ignored))


def _ignored(directory: Path) -> list[Callable[[Path], bool]]:
    """What a directory's .gitignore and .rayignore say of a path below it, as Ray reads them for `ray job submit`."""
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    return get_excludes_from_ignore_files(directory, include_gitignore=gitignore)
