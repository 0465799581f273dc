"""What a submitted job carries: a zip of the config, the files it names, and the code; nothing else of this machine.

Ray unpacks it into the job's working directory on every node and puts that directory first on Python's path. Beside
the code lies a copy of its package metadata, so that vLLM finds our plug-in there as if the package were installed.
"""

from __future__ import annotations

import importlib.metadata
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import stage_ray
from stage_ray.config import RunConfig
from stage_ray.errors import ConfigError

CAP_MIB = 512
"""Ray keeps a working directory in the head's memory and takes no larger one (its greatest gRPC message)."""
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
        working_dir: take this directory instead of it and of the files that the config names.

    Raises:
        ConfigError: ``working_dir`` is no directory, or holds another file where the config must lie.
    """
    if working_dir is None:
        files = _named_files(run)
        if code:
            files |= _own_code()
    elif working_dir.is_dir():
        files = dict(_walk(working_dir, LEFT_OUT_AT_TOP))
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
            f"{biggest}: put them on storage that the cluster shares, or into the image"
        )
    return target


def _own_code() -> dict[str, Path]:
    """The package that runs here, in the shape of an unpacked wheel."""
    root = Path(stage_ray.__file__).parent
    files = {f"stage_ray/{name}": path for name, path in _walk(root, set())}
    distribution = importlib.metadata.distribution("stage-ray")
    directory = f"stage_ray-{distribution.version}.dist-info"
    for name in ("METADATA", "entry_points.txt"):
        path = Path(str(distribution.locate_file(f"{directory}/{name}")))
        if path.is_file():
            files[f"{directory}/{name}"] = path
    return files


def _named_files(run: RunConfig) -> dict[str, Path]:
    """Files below the current directory that the config names by a relative path: prompts, and a model."""
    files: dict[str, Path] = {}
    for name in (run.prompts.train, run.prompts.heldout, run.policy.path):
        path = Path(name or "")
        inside = None if path.is_absolute() or name is None else _inside(path, Path.cwd())
        if inside and path.is_file():
            files[inside] = path
        elif inside and path.is_dir():
            files |= {f"{inside}/{below}": file for below, file in _walk(path, set())}
    return files


def _inside(path: Path, directory: Path) -> str | None:
    """A path relative to a directory that it lies in; None if it lies elsewhere."""
    path, directory = path.resolve(), directory.resolve()
    return path.relative_to(directory).as_posix() if path.is_relative_to(directory) else None


def _walk(root: Path, left_out_at_top: set[str]) -> Iterator[tuple[str, Path]]:
    """Files below a directory with their names relative to it.

    Left out: what is hidden (``.git``, ``.venv``, ``.env``), caches, virtual environments, and links to directories.
    """
    pending = [root]
    while pending:
        directory = pending.pop()
        for path in sorted(directory.iterdir()):
            hidden = path.name.startswith(".") or path.name in LEFT_OUT or path.name.endswith(".egg-info")
            if hidden or (directory == root and path.name in left_out_at_top):
                continue
            if path.is_file():
                yield path.relative_to(root).as_posix(), path
            elif path.is_dir() and not path.is_symlink() and not (path / "pyvenv.cfg").exists():
                pending.append(path)
