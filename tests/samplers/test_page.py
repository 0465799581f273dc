"""README.md of the samplers: every sampler and option stands there, and what it tells people to type is taken."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import stage_ray.samplers
from stage_ray.cli import app
from stage_ray.config import SuiteConfig
from stage_ray.config.load import validate_config
from stage_ray.registry import Registry
from stage_ray.samplers import SAMPLERS, SEARCHES, TRANSFORMS, load_rule, load_search
from tests.plain import FAMILY

PAGE = Path(str(stage_ray.samplers.__file__)).with_name("README.md").read_text()
LINES = [line for line in PAGE.splitlines() if line.startswith("stage-ray ")]


@pytest.mark.parametrize("registry", [SAMPLERS, TRANSFORMS, SEARCHES], ids=lambda registry: registry.what)
def test_every_sampler_has_a_row_and_every_option_is_named(registry: Registry) -> None:
    for name in registry.names():
        assert re.search(rf"^\| `{name}`", PAGE, flags=re.MULTILINE), f"{name} has no row"
        for option in registry.find(name, name).model_fields:
            assert f"`{option}`" in PAGE, f"{option} of {name} is not named"


@pytest.mark.parametrize("line", LINES)
def test_every_line_is_one_that_the_program_takes_with_samplers_that_are_there(line: str) -> None:
    name, *rest = shlex.split(line)[1:]
    context = get_command(app).commands[name].make_context(name, rest)  # type: ignore[attr-defined]
    settings = [one for one in context.params.get("overrides") or [] if one.startswith("rollout.")]
    data: dict[str, Any] = {"steps": 1, "policy": {"path": "-", "family": FAMILY}, "prompts": {"train": "-"}}
    run = validate_config(data | {"rewards": [{"type": "none"}], "evaluation": {"enabled": False}}, settings)
    load_rule(run.rollout)
    assert (load_search(run.rollout, ["none"]) is None) == ("rollout.search" not in line)


def test_the_judges_of_the_suite_on_the_page_are_asked_the_papers_questions() -> None:
    (block,) = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)]
    (suite,) = (SuiteConfig.model_validate(one) for one in block["evaluation"]["suites"])
    search = load_search(suite, ["geneval"], "evaluation.suites.0")
    assert search is not None and list(search.judges()) == ["clarity", "potential", "reflection"]
    assert all("question" in judge.options for judge in search.judges().values())
