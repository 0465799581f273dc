"""The wheel is whole: unpacked somewhere, it works in an empty directory without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel. It is built in a copy: setuptools leaves its files beside the sources."""
    directory = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "configs", directory / "source" / "configs")
    unused = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "stage_ray", directory / "source" / "stage_ray", symlinks=True, ignore=unused)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory / "source")
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=directory / "source", check=True, timeout=100)
    (wheel,) = directory.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(directory / "site")
    return directory / "site"


def test_every_file_of_the_package_is_in_the_wheel(installed: Path) -> None:
    files = [file for file in (ROOT / "stage_ray").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    names = [file.relative_to(ROOT) for file in files]
    names += [Path("stage_ray") / file.relative_to(ROOT) for file in (ROOT / "configs").glob("*.yaml")]
    assert not [name for name in names if not (installed / name).is_file()]


def test_a_shipped_config_is_trained_by_its_name_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    code = """if True:
        import stage_ray
        from stage_ray.cli import main
        print(stage_ray.__file__)
        assert not main(["configs"]) and not main(["init", "gcpo_shapeworld"])
        assert stage_ray.load_config("gcpo_shapeworld.yaml").recipe == "gcpo"
        assert not main(["train", "stage_shapeworld", "--dry-run"])
    """
    environment = os.environ | {"PYTHONPATH": str(installed)}  # before the editable install
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{installed}/stage_ray/__init__.py\n")
    assert "\nstage_shapeworld\n    STAGE on ShapeWorld" in done.stdout
    assert "\nrun_dir: runs/stage_shapeworld\n" in done.stdout
