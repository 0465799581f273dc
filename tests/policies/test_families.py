"""A family is found by its name or dotted path, and asking for it loads no model code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stage_ray.cli import main
from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies import POLICIES, policy_class
from stage_ray.policies.base import Policy
from stage_ray.policies.janus import JanusPolicy

DEFAULT_JOB = str(Path(__file__).parents[2] / "configs" / "stage_shapeworld.yaml")


def family(name: str) -> type[Policy]:
    return policy_class(PolicyConfig(path="x", family=name))


def test_a_family_is_a_folder_or_the_dotted_path_of_a_users_own_policy() -> None:
    assert POLICIES.names() == ["emu3", "janus", "llamagen"]
    assert family("janus") is family("stage_ray.policies.janus.JanusPolicy") is JanusPolicy


def test_an_unknown_family_is_refused_with_the_nearest_name_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = ["train", DEFAULT_JOB, "--set", "policy.family=januss", "--set", "rollout.engine=torch", "--dry-run"]
    assert main(job) == 2
    assert "policy.family = 'januss' is no known family; did you mean 'janus'?" in capsys.readouterr().err


def test_a_class_that_is_no_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy.family = 'pathlib.Path' is no subclass of .*\.Policy"):
        family("pathlib.Path")


@pytest.mark.parametrize(
    ("imports", "unwanted"),
    [
        ("import stage_ray.engines, stage_ray.engines.vllm.environment", "torch"),
        ("import stage_ray.policies as p; p.POLICIES.find('janus', 'policy.family')", "transformers.models.janus"),
        ("import stage_ray.policies as p; p.POLICIES.find('llamagen', 'policy.family')", "transformers.models."),
        ("import stage_ray.policies as p; p.POLICIES.find('emu3', 'policy.family')", "transformers.models."),
    ],
)
def test_what_the_driver_asks_before_a_run_imports_no_models(imports: str, unwanted: str) -> None:
    code = f"import sys; {imports}; assert not [m for m in sys.modules if m.startswith({unwanted!r})]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
