"""What deploy/README.md tells an operator to type: options that exist, values of the chart, files that are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli
from typer.main import get_command

from stage_ray import __version__
from stage_ray.cli import app
from stage_ray.commands.job import plan_job
from stage_ray.errors import ConfigError
from tests.pages import DEPLOY as DEPLOY_PAGE
from tests.pages import REASONS, TABLE, named_tests

DEPLOY = Path(__file__).parents[2] / "deploy"
ROOT = DEPLOY.parent
TEXT = (DEPLOY / "README.md").read_text(encoding="utf-8")
VALUES = DEPLOY / "helm" / "stage-ray" / "values.yaml"


def commands(program: str) -> list[list[str]]:
    """Words after a program's name, of every line in a block, and of inline code that starts with it."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL) for line in block.splitlines()]
    lines += re.findall(rf"`({program} [^`]*--[^`]*)`", TEXT)
    words = [shlex.split(re.split(r"\s+#\s|&&", line)[0]) for line in lines if line.startswith(program + " ")]
    return [line[1:] for line in words]


def values_on_the_page() -> list[tuple[str, ...]]:
    """Keys that the page gives to our chart, by `--set`, in a values file or by name; each with those above it."""
    ours = [words for words in commands("helm") if "deploy/helm/stage-ray" in words]
    assert len(ours) >= 4
    dotted = [
        words[i + 1].partition("=")[0]
        for words in ours
        for i, word in enumerate(words)
        if word in ("--set", "--set-file")
    ]
    dotted += re.findall(
        r"`((?:job|mode|config|rayVersion|terminationGracePeriodSeconds|secretEnv|huggingFace|labels|annotations"
        r"|podSecurity|pod|container|head)(?:\.\w+)*)",
        TEXT,
    )
    keys = [tuple(key.split(".")) for key in dotted]
    pending: list[tuple[tuple[str, ...], Any]] = [
        ((), yaml.safe_load(block)) for block in re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    ]
    while pending:
        above, value = pending.pop()
        if isinstance(value, dict):
            pending += [((*above, key), below) for key, below in value.items()]
        else:
            keys.append(above)
    return keys


@pytest.mark.parametrize("arguments", commands("stage-ray"), ids=" ".join)
def test_every_command_of_ours_is_one_that_the_program_takes(arguments, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush")
    name, *rest = arguments
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    taken = command.make_context(name, rest).params
    if name == "submit":  # and that a cluster would be asked
        planned = plan_job(ROOT / taken["config"], taken["overrides"] or [], taken["run_dir"], env=taken["env"] or [])
        assert planned.run_dir.startswith("/shared/")


@pytest.mark.parametrize("arguments", commands("ray"), ids=" ".join)
def test_every_command_of_rays_is_one_that_ray_takes(arguments):
    group, (name, *rest) = ray_cli, arguments
    if name == "job":
        group, (name, *rest) = group.commands["job"], rest
    context = group.commands[name].make_context(name, rest)
    if "stage-ray" in rest:
        inner = list(context.params["entrypoint"])
        assert inner[:2] == ["stage-ray", "train"]
        get_command(app).commands["train"].make_context("train", inner[2:])  # type: ignore[attr-defined]


def test_the_page_leads_through_all_of_it():
    assert len(commands("stage-ray")) >= 5 and len(commands("ray")) >= 5
    operator = [words for words in commands("helm") if "kuberay/kuberay-operator" in words]
    assert operator and operator[0][operator[0].index("--version") + 1] == "1.7.0"


def test_every_value_on_the_page_is_one_of_the_chart():
    known = yaml.safe_load(VALUES.read_text())
    for name, group in known["groups"].items():
        known["groups"][name] = known["groups"]["rollout"] | group  # where every key of a group is shown
    for key in values_on_the_page():
        node = known
        for part in key:
            if node == {}:
                break  # labels, fields of pods: names of Kubernetes', which the schema checks
            assert isinstance(node, dict) and part in node, f"{key}: the chart has no {part!r}"
            node = node[part]


def test_the_page_says_what_was_tried_as_the_table_of_the_tests_does():
    tried = TEXT[TEXT.index("\n## Tried") :]
    for how in set(TABLE[DEPLOY_PAGE].values()):
        for name in named_tests(how):
            file = name.partition("::")[0]
            assert f"`{file}`" in tried, f"{file} runs lines of this page"
        reason = how.partition(";")[0]
        assert reason not in REASONS or f"**{reason}**" in tried, reason


def test_the_image_on_the_page_has_the_packages_version():
    assert f"stage-ray:{__version__} " in TEXT and f"tag: {__version__}" in TEXT


def test_every_file_that_the_page_names_is_there():
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    listed = re.findall(r"^\| `([\w./-]+)`", TEXT, flags=re.MULTILINE)
    missing = [name for name in linked + listed if not (DEPLOY / name).exists()]
    assert not missing


def test_a_relative_run_directory_would_be_refused_as_the_page_says():
    with pytest.raises(ConfigError, match="relative"):
        plan_job(ROOT / "configs" / "stage_shapeworld.yaml")
